"""The device service: what clients read before they use the search service."""

import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import quote
from xml.etree.ElementTree import Element

from upperson_console.onvif.soap import (
    DEVICE,
    SCHEMA,
    SEARCH,
    FaultError,
    Fields,
    element,
    elements,
    invalid,
    is_true,
)
from upperson_rt import __version__

PRODUCT = "UP-Person Edge"
_MODEL = "upperson-rt serve"
ABILITIES = {
    "MetadataSearch": "false",
    "GeneralStartEvents": "false",
    "NLSearch": "true",
    "ImageSearch": "true",
}
"""Capabilities of the search service."""
_NETWORK = ("IPFilter", "ZeroConfiguration", "IPVersion6", "DynDNS", "HostnameFromDHCP")
_VERSION = {"Major": 26, "Minor": 6}
"""Of the standard."""
_CATEGORIES = {"All", "Analytics", "Device", "Events", "Imaging", "Media", "PTZ"}
SCOPES = tuple(
    f"onvif://www.onvif.org/{category}/{quote(value)}"
    for category, value in (("name", PRODUCT), ("hardware", _MODEL))
)
"""None of a profile: no conformance to one was tested."""


@dataclass(frozen=True)
class Address:
    """The address at which a client reached this server."""

    base: str
    """Scheme, host and port."""
    path: str
    """Path of the ONVIF services."""
    reached: str = ""
    """IP address of this machine that the client reached."""

    def service(self, name: str) -> str:
        """Return the address of a service."""
        return f"{self.base}{self.path}/{name}_service"

    def picture(self, id_: int) -> str:
        """Return the address of a picture."""
        return f"{self.base}{self.path}/pictures/{id_}"


Operation: TypeAlias = Callable[[Element, Address], Element]


class DeviceService:
    """The operations of the device service, by the names of their requests."""

    def __init__(self, fingerprint: str, variant: str, is_discoverable: bool) -> None:
        """Describe a server; the fingerprint of its model is the serial number."""
        self.public: dict[str, Operation] = {
            f"{{{DEVICE}}}GetSystemDateAndTime": _time,
            f"{{{DEVICE}}}GetServices": self._services,
            f"{{{DEVICE}}}GetServiceCapabilities": self._service_capabilities,
            f"{{{DEVICE}}}GetCapabilities": _capabilities,
            f"{{{DEVICE}}}GetHostname": _hostname,
            f"{{{SEARCH}}}GetServiceCapabilities": _search_capabilities,
        }
        """Those without authentication (access class PRE_AUTH)."""
        self.private: dict[str, Operation] = {
            f"{{{DEVICE}}}GetDeviceInformation": self._information,
            f"{{{DEVICE}}}GetScopes": _scopes,
            f"{{{DEVICE}}}GetNetworkInterfaces": _network_interfaces,
        }
        self._about = {
            "Manufacturer": PRODUCT,
            "Model": _MODEL,
            "FirmwareVersion": __version__,
            "SerialNumber": fingerprint,
            "HardwareId": variant,
        }
        self._is_discoverable = is_discoverable

    def _information(self, request: Element, address: Address) -> Element:
        Fields(request)
        return element(DEVICE, "GetDeviceInformationResponse", *elements(DEVICE, self._about))

    def _abilities(self, address: Address) -> Element:
        """Return what the device service can do: it has no settings that clients may change."""
        here, away = ("true", "false") if self._is_discoverable else ("false", "true")
        is_tls = str(address.base.startswith("https:")).lower()
        system = {
            "DiscoveryResolve": "false", "DiscoveryBye": here, "RemoteDiscovery": "false",
            "SystemBackup": "false", "SystemLogging": "false", "DiscoveryNotSupported": away,
            "NetworkConfigNotSupported": "true", "UserConfigNotSupported": "true",
        }  # fmt: skip
        security = {
            "TLS1.2": is_tls, "RemoteUserHandling": "false", "UsernameToken": "true",
            "HttpDigest": "true",
        }  # fmt: skip
        network = dict.fromkeys(_NETWORK, "false")
        return element(
            DEVICE,
            "Capabilities",
            element(DEVICE, "Network", NTP="0", **network),
            element(DEVICE, "Security", **security),
            element(DEVICE, "System", **system),
        )

    def _service_capabilities(self, request: Element, address: Address) -> Element:
        Fields(request)
        return element(DEVICE, "GetServiceCapabilitiesResponse", self._abilities(address))

    def _services(self, request: Element, address: Address) -> Element:
        is_wanted = Fields(request, "IncludeCapability").one("IncludeCapability", is_true)
        services = [
            element(
                DEVICE,
                "Service",
                *elements(DEVICE, {"Namespace": namespace, "XAddr": address.service(name)}),
                element(DEVICE, "Capabilities", abilities) if is_wanted else None,
                element(DEVICE, "Version", *elements(SCHEMA, _VERSION)),
            )
            for namespace, name, abilities in (
                (DEVICE, "device", self._abilities(address)),
                (SEARCH, "search", element(SEARCH, "Capabilities", **ABILITIES)),
            )
        ]
        return element(DEVICE, "GetServicesResponse", *services)


def _time(request: Element, address: Address) -> Element:
    Fields(request)
    now = time.gmtime()
    clock = {"Hour": now.tm_hour, "Minute": now.tm_min, "Second": now.tm_sec}
    date = {"Year": now.tm_year, "Month": now.tm_mon, "Day": now.tm_mday}
    moment = element(
        DEVICE,
        "SystemDateAndTime",
        *elements(SCHEMA, {"DateTimeType": "NTP", "DaylightSavings": "false"}),
        element(SCHEMA, "TimeZone", element(SCHEMA, "TZ", "UTC0")),
        element(
            SCHEMA,
            "UTCDateTime",
            element(SCHEMA, "Time", *elements(SCHEMA, clock)),
            element(SCHEMA, "Date", *elements(SCHEMA, date)),
        ),
    )
    return element(DEVICE, "GetSystemDateAndTimeResponse", moment)


def _capabilities(request: Element, address: Address) -> Element:
    categories = {one.text or "" for one in Fields(request, repeated=["Category"]).all("Category")}
    if categories - _CATEGORIES:
        raise invalid(f"a Category is one of {', '.join(sorted(_CATEGORIES))}")
    if categories and not categories & {"All", "Device"}:
        raise FaultError(
            "Receiver", ("ActionNotSupported", "NoSuchService"), "there is no such service here"
        )
    searches = {name: able for name, able in ABILITIES.items() if name.endswith("Search")}
    places = {name: {"XAddr": address.service(name)} for name in ("device", "search")}
    device = element(SCHEMA, "Device", *elements(SCHEMA, places["device"]))
    search = element(SCHEMA, "Search", *elements(SCHEMA, places["search"] | searches))
    capabilities = element(DEVICE, "Capabilities", device, element(SCHEMA, "Extension", search))
    return element(DEVICE, "GetCapabilitiesResponse", capabilities)


def _search_capabilities(request: Element, address: Address) -> Element:
    Fields(request)
    abilities = element(SEARCH, "Capabilities", **ABILITIES)
    return element(SEARCH, "GetServiceCapabilitiesResponse", abilities)


def _hostname(request: Element, address: Address) -> Element:
    Fields(request)
    values = {"FromDHCP": "false", "Name": socket.gethostname()}
    content = element(DEVICE, "HostnameInformation", *elements(SCHEMA, values))
    return element(DEVICE, "GetHostnameResponse", content)


def _scopes(request: Element, address: Address) -> Element:
    Fields(request)
    scopes = [{"ScopeDef": "Fixed", "ScopeItem": scope} for scope in SCOPES]
    content = (element(DEVICE, "Scopes", *elements(SCHEMA, scope)) for scope in scopes)
    return element(DEVICE, "GetScopesResponse", *content)


def _network_interfaces(request: Element, address: Address) -> Element:
    """Return the one interface at which the client reached this server."""
    Fields(request)
    name, hardware, prefix = _interface_of(address.reached)
    info = element(SCHEMA, "Info", *elements(SCHEMA, {"Name": name, "HwAddress": hardware}))
    config = None
    if prefix is not None:
        values = {"Address": address.reached, "PrefixLength": prefix}
        manual = element(SCHEMA, "Manual", *elements(SCHEMA, values))
        inner = element(SCHEMA, "Config", manual, element(SCHEMA, "DHCP", "false"))
        config = element(SCHEMA, "IPv4", element(SCHEMA, "Enabled", "true"), inner)
    enabled = element(SCHEMA, "Enabled", "true")
    content = element(DEVICE, "NetworkInterfaces", enabled, info, config, token=name)
    return element(DEVICE, "GetNetworkInterfacesResponse", content)


def _interface_of(address: str) -> tuple[str, str, int | None]:
    """Return name, hardware address and prefix length of the interface with an IPv4 address.

    Where the system does not report them, they are ``network``, zeros and None.
    """
    if sys.platform == "linux":
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:

            def ask(code: int, name: str) -> bytes:
                try:
                    return fcntl.ioctl(opened, code, struct.pack("256s", name.encode()))[18:24]
                except OSError:  # It has none.
                    return bytes(6)

            for _, name in socket.if_nameindex():
                if socket.inet_ntoa(ask(0x8915, name)[2:]) == address:  # SIOCGIFADDR
                    mask = int.from_bytes(ask(0x891B, name)[2:], "big")  # SIOCGIFNETMASK
                    return name, ask(0x8927, name).hex(":"), mask.bit_count()  # SIOCGIFHWADDR
    return "network", "00:00:00:00:00:00", None
