"""The published description of the standard, as a client brings it, against this server."""

from pathlib import Path
from urllib.parse import urlsplit

import onvif
import pytest
from lxml import etree
from onvif import CacheMode, ONVIFClient, ZeepPatcher

from tests.unit.runtime.serve.onvif.test_search import ALL, MINUTE
from upperson_console.onvif.description import wsdl

PUBLISHED = Path(onvif.__file__).parent / "wsdl" / "ver10"
XS = "{http://www.w3.org/2001/XMLSchema}"


@pytest.mark.parametrize("http_digest", [False, True])
def test_its_client_searches(shared, red_jpeg, request, http_digest):
    place = urlsplit(shared.url)
    user = place.hostname, place.port, "vms", shared.passwords["vms"]
    client = ONVIFClient(*user, http_digest=http_digest, cache=CacheMode.NONE)
    request.addfinalizer(ZeepPatcher.remove_patch)  # It changes what other tests use.
    about = client.devicemgmt().GetDeviceInformation()
    assert about.SerialNumber == shared.service.encoder.fingerprint
    assert client.devicemgmt().GetCapabilities().Extension.Search["ImageSearch"] is True
    search = client.search()
    assert search.GetServiceCapabilities().NLSearch is True
    token = search.SearchImageByNL(Text="a woman in red", MaxMatches=4, **ALL)
    found = search.GetNLSearchResults(token, MinResults=1, MaxResults=3, WaitTime=MINUTE)
    assert (found.SearchState, len(found.Result)) == ("Searching", 3)
    assert found.Result[0].Similarity > found.Result[2].Similarity
    assert search.EndSearch(token) == ALL["EndPoint"]
    token = search.SearchImageByImage(TargetImageData=red_jpeg, **ALL)
    assert len(search.GetImageSearchResults(token).Result) == 12
    search.EndSearch(token)
    token = search.FindRecordings(Scope={}, KeepAliveTime=MINUTE)
    assert len(search.GetRecordingSearchResults(token).RecordingInformation) == 2
    search.EndSearch(token)


def declared(content):
    """Elements and types of schemas by name: names, types and least numbers of their parts."""
    found = {}
    for schema in etree.fromstring(content).iter(f"{XS}schema"):
        for top in schema:
            parts = [
                (one.get("name"), one.get("type"), one.get("minOccurs", "1"))
                if one.get("ref") is None
                else (one.get("ref").partition(":")[2], None, one.get("minOccurs", "1"))
                for one in top.iter(f"{XS}element", f"{XS}attribute")
                if one is not top
            ]
            if top.get("name"):
                kind = etree.QName(top).localname
                found[schema.get("targetNamespace"), kind, top.get("name")] = parts
    return found


def operations(content):
    """The action of each operation."""
    return {
        one.get("name"): one[0].get("soapAction")
        for one in etree.fromstring(content).iter("{http://schemas.xmlsoap.org/wsdl/}operation")
        if one[0].get("soapAction") is not None
    }


@pytest.mark.parametrize(
    ("own", "published"),
    [("search", "search.wsdl"), ("device", "device/wsdl/devicemgmt.wsdl")],
)
def test_what_this_server_declares_is_declared_so(own, published):
    theirs, there = {}, operations((PUBLISHED / published).read_bytes())
    for name, action in operations(wsdl(own)).items():
        assert there[name] == action
    notification = PUBLISHED.parent / "schema" / "common" / "b-2.xsd"
    files = (PUBLISHED / "schema" / f"{name}.xsd" for name in ("onvif", "common"))
    for file in (PUBLISHED / published, notification, *files):
        theirs |= declared(file.read_bytes().replace(b'"xsd:', b'"xs:'))
    for (space, kind, name), parts in declared(wsdl(own)).items():
        there = theirs[space, kind, name]
        if name == "NetworkInterface":
            there += theirs[space, kind, "DeviceEntity"]  # Which it extends.
        for part in parts:
            assert part in there or (part[0], None, part[2]) in there, (name, part)
        order = [part[0] for part in there]
        assert [order.index(part[0]) for part in parts] == sorted(
            order.index(part[0]) for part in parts
        ), name
