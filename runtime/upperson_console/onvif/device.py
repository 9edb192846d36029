"""The device service, as far as clients need it to find the search service."""

import time
from collections.abc import Callable
from dataclasses import dataclass
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

ABILITIES = {
    "MetadataSearch": "false",
    "GeneralStartEvents": "false",
    "NLSearch": "true",
    "ImageSearch": "true",
}
"""Capabilities of the search service."""
_VERSION = {"Major": 26, "Minor": 6}
"""Of the standard."""
_CATEGORIES = {"All", "Analytics", "Device", "Events", "Imaging", "Media", "PTZ"}


@dataclass(frozen=True)
class Address:
    """The address at which a client reached this server."""

    base: str
    """Scheme, host and port."""
    path: str
    """Path of the ONVIF services."""

    def service(self, name: str) -> str:
        """Return the address of a service."""
        return f"{self.base}{self.path}/{name}_service"

    def picture(self, id_: int) -> str:
        """Return the address of a picture."""
        return f"{self.base}{self.path}/pictures/{id_}"


def device_information(fingerprint: str, variant: str) -> Element:
    """Return the device information; the fingerprint of the model is the serial number."""
    values = {
        "Manufacturer": "UP-Person Edge",
        "Model": "upperson-rt serve",
        "FirmwareVersion": __version__,
        "SerialNumber": fingerprint,
        "HardwareId": variant,
    }
    return element(DEVICE, "GetDeviceInformationResponse", *elements(DEVICE, values))


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


def _services(request: Element, address: Address) -> Element:
    with_abilities = Fields(request, "IncludeCapability").one("IncludeCapability", is_true)
    abilities = element(DEVICE, "Capabilities", element(SEARCH, "Capabilities", **ABILITIES))
    services = [
        element(
            DEVICE,
            "Service",
            *elements(DEVICE, {"Namespace": namespace, "XAddr": address.service(name)}),
            abilities if with_abilities and namespace == SEARCH else None,
            element(DEVICE, "Version", *elements(SCHEMA, _VERSION)),
        )
        for namespace, name in ((DEVICE, "device"), (SEARCH, "search"))
    ]
    return element(DEVICE, "GetServicesResponse", *services)


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


PUBLIC: dict[str, Callable[[Element, Address], Element]] = {
    f"{{{DEVICE}}}GetSystemDateAndTime": _time,
    f"{{{DEVICE}}}GetServices": _services,
    f"{{{DEVICE}}}GetCapabilities": _capabilities,
    f"{{{SEARCH}}}GetServiceCapabilities": _search_capabilities,
}
"""Operations without authentication (access class PRE_AUTH), by the name of the request."""
