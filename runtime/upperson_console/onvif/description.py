"""The WSDL of both services, written from a short list of their types and operations.

The names are those of the published schema version 26.06. A line is one of
- ``text tt:Name = 64``: a text with a longest length, or none,
- ``choice tt:State = Queued Searching``: one of some texts,
- ``tt:Type: Name xs:int, Other tt:Kind*, @attribute xs:boolean``: a complex type,
- ``Operation(Name xs:int) -> Name xs:int``: an operation; its name ends in ``Request`` where the
  published element of the request does.

After the type of an element, ``?`` means 0 or 1 of it, ``*`` any number, ``+`` at least 1. A type
may begin with ``text`` instead of elements; ``any`` stands for any element.
"""

import re
from functools import cache
from typing import Literal, TypeAlias
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from upperson_console.onvif.soap import DEVICE, NOTIFICATION, SCHEMA, SEARCH

ServiceName: TypeAlias = Literal["device", "search"]
_WSDL = "http://schemas.xmlsoap.org/wsdl/"
_SOAP = "http://schemas.xmlsoap.org/wsdl/soap12/"
_XS = "http://www.w3.org/2001/XMLSchema"
_PREFIXES = {"tt": SCHEMA, "wsnt": NOTIFICATION, "tds": DEVICE, "tse": SEARCH}
_OCCURS = {"": "", "?": "0 1", "*": "0 unbounded", "+": "1 unbounded"}

_DEVICE_SERVICE = """
text tt:ReferenceToken = 64
choice tt:SetDateTimeType = Manual NTP
choice tt:CapabilityCategory = All Analytics Device Events Imaging Media PTZ
choice tt:ScopeDefinition = Fixed Configurable
text tt:HwAddress
text tt:IPv4Address
tt:Time: Hour xs:int, Minute xs:int, Second xs:int
tt:Date: Year xs:int, Month xs:int, Day xs:int
tt:DateTime: Time tt:Time, Date tt:Date
tt:TimeZone: TZ xs:token
tt:SystemDateTime: DateTimeType tt:SetDateTimeType, DaylightSavings xs:boolean, \
 TimeZone tt:TimeZone?, UTCDateTime tt:DateTime?
tt:OnvifVersion: Major xs:int, Minor xs:int
tt:DeviceCapabilities: XAddr xs:anyURI
tt:SearchCapabilities: XAddr xs:anyURI, MetadataSearch xs:boolean, NLSearch xs:boolean?, \
 ImageSearch xs:boolean?
tt:CapabilitiesExtension: Search tt:SearchCapabilities?
tt:Capabilities: Device tt:DeviceCapabilities?, Extension tt:CapabilitiesExtension?
tt:Scope: ScopeDef tt:ScopeDefinition, ScopeItem xs:anyURI
tt:HostnameInformation: FromDHCP xs:boolean, Name xs:token?
tt:PrefixedIPv4Address: Address tt:IPv4Address, PrefixLength xs:int
tt:IPv4Configuration: Manual tt:PrefixedIPv4Address*, DHCP xs:boolean
tt:IPv4NetworkInterface: Enabled xs:boolean, Config tt:IPv4Configuration
tt:NetworkInterfaceInfo: Name xs:string?, HwAddress tt:HwAddress, MTU xs:int?
tt:NetworkInterface: Enabled xs:boolean, Info tt:NetworkInterfaceInfo?, \
 IPv4 tt:IPv4NetworkInterface?, @token tt:ReferenceToken
tds:Service: Namespace xs:anyURI, XAddr xs:anyURI, Capabilities any?, Version tt:OnvifVersion
tds:NetworkCapabilities: @IPFilter xs:boolean, @ZeroConfiguration xs:boolean, \
 @IPVersion6 xs:boolean, @DynDNS xs:boolean, @HostnameFromDHCP xs:boolean, @NTP xs:int
tds:SecurityCapabilities: @TLS1.2 xs:boolean, @RemoteUserHandling xs:boolean, \
 @UsernameToken xs:boolean, @HttpDigest xs:boolean
tds:SystemCapabilities: @DiscoveryResolve xs:boolean, @DiscoveryBye xs:boolean, \
 @RemoteDiscovery xs:boolean, @SystemBackup xs:boolean, @SystemLogging xs:boolean, \
 @DiscoveryNotSupported xs:boolean, @NetworkConfigNotSupported xs:boolean, \
 @UserConfigNotSupported xs:boolean
tds:DeviceServiceCapabilities: Network tds:NetworkCapabilities, \
 Security tds:SecurityCapabilities, System tds:SystemCapabilities
GetServices(IncludeCapability xs:boolean) -> Service tds:Service+
GetServiceCapabilities() -> Capabilities tds:DeviceServiceCapabilities
GetCapabilities(Category tt:CapabilityCategory*) -> Capabilities tt:Capabilities
GetDeviceInformation() -> Manufacturer xs:string, Model xs:string, FirmwareVersion xs:string, \
 SerialNumber xs:string, HardwareId xs:string
GetSystemDateAndTime() -> SystemDateAndTime tt:SystemDateTime
GetScopes() -> Scopes tt:Scope+
GetHostname() -> HostnameInformation tt:HostnameInformation
GetNetworkInterfaces() -> NetworkInterfaces tt:NetworkInterface+
"""
_RESULTS = "SearchToken tt:JobToken, MinResults xs:int?, MaxResults xs:int?, WaitTime xs:duration?"
_FOUND = (
    "ObjectUUID xs:string, TargetImageURI xs:anyURI, Time xs:dateTime, Similarity xs:float, "
    "RecordingToken tt:RecordingReference"
)
_SEARCH_SERVICE = f"""
text tt:ReferenceToken = 64
text tt:RecordingReference = 64
text tt:TrackReference = 64
text tt:JobToken = 64
text tt:Name = 64
text tt:XPathExpression
text tt:Description
choice tt:SearchState = Queued Searching Completed Unknown
choice tt:RecordingStatus = Initiated Recording Stopped Removing Removed Unknown
choice tt:TrackType = Video Audio Metadata Extended
wsnt:TopicExpressionType: text, @Dialect xs:anyURI
wsnt:NotificationMessageHolderType: Topic wsnt:TopicExpressionType?, Message any
tt:EventFilter: any*
tt:SourceReference: Token tt:ReferenceToken, @Type xs:anyURI
tt:SearchScope: IncludedSources tt:SourceReference*, IncludedRecordings tt:RecordingReference*, \
 RecordingInformationFilter tt:XPathExpression?
tt:RecordingSourceInformation: SourceId xs:anyURI, Name tt:Name, Location tt:Description, \
 Description tt:Description, Address xs:anyURI
tt:TrackInformation: TrackToken tt:TrackReference, TrackType tt:TrackType, \
 Description tt:Description, DataFrom xs:dateTime, DataTo xs:dateTime
tt:RecordingInformation: RecordingToken tt:RecordingReference, \
 Source tt:RecordingSourceInformation, EarliestRecording xs:dateTime?, \
 LatestRecording xs:dateTime?, Content tt:Description, Track tt:TrackInformation*, \
 RecordingStatus tt:RecordingStatus
tt:RecordingSummary: DataFrom xs:dateTime, DataUntil xs:dateTime, NumberRecordings xs:int
tt:MetadataAttributes: CanContainPTZ xs:boolean, CanContainAnalytics xs:boolean, \
 CanContainNotifications xs:boolean
tt:TrackAttributes: TrackInformation tt:TrackInformation, \
 MetadataAttributes tt:MetadataAttributes?
tt:MediaAttributes: RecordingToken tt:RecordingReference, TrackAttributes tt:TrackAttributes*, \
 From xs:dateTime, Until xs:dateTime
tt:FindRecordingResultList: SearchState tt:SearchState, \
 RecordingInformation tt:RecordingInformation*
tt:FindEventResult: RecordingToken tt:RecordingReference, TrackToken tt:TrackReference, \
 Time xs:dateTime, Event wsnt:NotificationMessageHolderType, StartStateEvent xs:boolean
tt:FindEventResultList: SearchState tt:SearchState, Result tt:FindEventResult*
tt:FindNLSearchResult: {_FOUND}
tt:FindNLSearchResultList: SearchState tt:SearchState, Result tt:FindNLSearchResult*
tt:FindObjectImageResult: {_FOUND}
tt:FindObjectImageResultList: SearchState tt:SearchState, Result tt:FindObjectImageResult*
tse:Capabilities: @MetadataSearch xs:boolean, @GeneralStartEvents xs:boolean, \
 @NLSearch xs:boolean, @ImageSearch xs:boolean
GetServiceCapabilities() -> Capabilities tse:Capabilities
GetRecordingSummary() -> Summary tt:RecordingSummary
GetRecordingInformation(RecordingToken tt:RecordingReference) -> \
 RecordingInformation tt:RecordingInformation
GetMediaAttributes(RecordingTokens tt:RecordingReference*, Time xs:dateTime) -> \
 MediaAttributes tt:MediaAttributes*
FindRecordings(Scope tt:SearchScope, MaxMatches xs:int?, KeepAliveTime xs:duration) -> \
 SearchToken tt:JobToken
GetRecordingSearchResults({_RESULTS}) -> ResultList tt:FindRecordingResultList
FindEvents(StartPoint xs:dateTime, EndPoint xs:dateTime?, Scope tt:SearchScope, \
 SearchFilter tt:EventFilter, IncludeStartState xs:boolean, MaxMatches xs:int?, \
 KeepAliveTime xs:duration) -> SearchToken tt:JobToken
GetEventSearchResults({_RESULTS}) -> ResultList tt:FindEventResultList
SearchImageByNLRequest(StartPoint xs:dateTime, EndPoint xs:dateTime?, \
 RecordingToken tt:RecordingReference?, Text xs:string, Similarity xs:float?, \
 MaxMatches xs:int?, KeepAliveTime xs:duration) -> SearchToken tt:JobToken
GetNLSearchResultsRequest({_RESULTS}) -> ResultList tt:FindNLSearchResultList
SearchImageByImageRequest(StartPoint xs:dateTime, EndPoint xs:dateTime?, \
 RecordingToken tt:RecordingReference?, TargetImageURI xs:anyURI?, \
 TargetImageData xs:base64Binary?, MaxMatches xs:int?, KeepAliveTime xs:duration) -> \
 SearchToken tt:JobToken
GetImageSearchResultsRequest({_RESULTS}) -> ResultList tt:FindObjectImageResultList
GetSearchState(SearchToken tt:JobToken) -> State tt:SearchState
EndSearch(SearchToken tt:JobToken) -> Endpoint xs:dateTime
"""
_SERVICES = {"device": ("tds", _DEVICE_SERVICE), "search": ("tse", _SEARCH_SERVICE)}


@cache
def wsdl(service: ServiceName) -> bytes:
    """Return the WSDL of a service: an XML document."""
    own, lines = _SERVICES[service]
    namespace, name = _PREFIXES[own], service.title()
    root = Element(f"{{{_WSDL}}}definitions", {"targetNamespace": namespace})
    for prefix, there in _PREFIXES.items():  # ElementTree writes xs, and sees none in values.
        root.set(f"xmlns:{prefix}", there)
    types = SubElement(root, f"{{{_WSDL}}}types")
    schemas = {prefix: _schema(types, prefix) for prefix in ("wsnt", "tt", own)}
    port = Element(f"{{{_WSDL}}}portType", {"name": f"{name}Port"})
    names = {"name": f"{name}Binding", "type": f"{own}:{name}Port"}
    binding = Element(f"{{{_WSDL}}}binding", names)
    style = {"style": "document", "transport": "http://schemas.xmlsoap.org/soap/http"}
    SubElement(binding, f"{{{_SOAP}}}binding", style)
    for line in lines.strip().splitlines():
        found = re.fullmatch(r"(\w+)\((.*)\) -> (.*)", line)
        if found is None:
            _add_type(schemas, line)
            continue
        operation = found[1].removesuffix("Request")
        ports = SubElement(port, f"{{{_WSDL}}}operation", {"name": operation})
        bound = SubElement(binding, f"{{{_WSDL}}}operation", {"name": operation})
        SubElement(bound, f"{{{_SOAP}}}operation", {"soapAction": f"{namespace}/{operation}"})
        for way, message, element, fields in (
            ("input", f"{operation}Request", found[1], found[2]),
            ("output", f"{operation}Response", f"{operation}Response", found[3]),
        ):
            _add_fields(SubElement(schemas[own], f"{{{_XS}}}element", {"name": element}), fields)
            part = {"name": "parameters", "element": f"{own}:{element}"}
            made = SubElement(root, f"{{{_WSDL}}}message", {"name": message})
            SubElement(made, f"{{{_WSDL}}}part", part)
            SubElement(ports, f"{{{_WSDL}}}{way}", {"message": f"{own}:{message}"})
            body = SubElement(bound, f"{{{_WSDL}}}{way}")
            SubElement(body, f"{{{_SOAP}}}body", {"use": "literal"})
    root.extend((port, binding))
    indent(root)
    content: bytes = tostring(root, "utf-8", xml_declaration=True)
    return content


def _schema(types: Element, prefix: str) -> Element:
    about = {"targetNamespace": _PREFIXES[prefix], "elementFormDefault": "qualified"}
    made = SubElement(types, f"{{{_XS}}}schema", about)
    for other in ("wsnt", "tt"):
        if other != prefix:
            SubElement(made, f"{{{_XS}}}import", {"namespace": _PREFIXES[other]})
    return made


def _add_type(schemas: dict[str, Element], line: str) -> None:
    found = re.fullmatch(r"(?:(text|choice) )?(\w+):(\w+)(?:: (.*)| = (.*))?", line)
    assert found is not None, line
    kind, prefix, name, fields, values = found.groups()
    if kind is None:
        _add_fields(schemas[prefix], fields, {"name": name})
        return
    simple = SubElement(schemas[prefix], f"{{{_XS}}}simpleType", {"name": name})
    base = SubElement(simple, f"{{{_XS}}}restriction", {"base": "xs:string"})
    facet = "enumeration" if kind == "choice" else "maxLength"
    for value in (values or "").split():
        SubElement(base, f"{{{_XS}}}{facet}", {"value": value})


def _add_fields(parent: Element, fields: str, about: dict[str, str] | None = None) -> None:
    """Add a complex type with fields."""
    made = SubElement(parent, f"{{{_XS}}}complexType", about or {})
    if fields.startswith("text"):
        text = SubElement(made, f"{{{_XS}}}simpleContent")
        made = inner = SubElement(text, f"{{{_XS}}}extension", {"base": "xs:string"})
        fields = fields.removeprefix("text, ")
    else:
        inner = SubElement(made, f"{{{_XS}}}sequence")
    for field in filter(None, re.split(r",\s*", fields)):
        *names, kind = field.split()
        kind, count = kind.rstrip("?*+"), _OCCURS[kind[len(kind.rstrip("?*+")) :]]
        occurs = dict(zip(("minOccurs", "maxOccurs"), count.split(), strict=False))
        if not names:
            more = {"namespace": "##any", "processContents": "lax"}
            SubElement(inner, f"{{{_XS}}}any", more | occurs)
        elif names[0].startswith("@"):
            SubElement(made, f"{{{_XS}}}attribute", {"name": names[0][1:], "type": kind})
        elif kind == "any":
            nested = SubElement(inner, f"{{{_XS}}}element", {"name": names[0]} | occurs)
            _add_fields(nested, "any")
        else:
            about = {"name": names[0], "type": kind}
            SubElement(inner, f"{{{_XS}}}element", about | occurs)
