"""The published description of the standard, as a client brings it, against this server."""

import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import onvif
import pytest
from lxml import etree
from onvif import CacheMode, ONVIFClient, ZeepPatcher

from tests.helpers.console import ODD
from tests.unit.runtime.serve.onvif.conftest import envelope
from tests.unit.runtime.serve.onvif.test_search import ALL, MINUTE
from upperson_rt.gallery import Filter

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


# --- Responses are valid by the schema

SPAN = (
    "<tse:StartPoint>2026-09-21T14:00:00Z</tse:StartPoint>"
    "<tse:EndPoint>2026-09-22T00:00:00Z</tse:EndPoint>"
)
KEPT = "<tse:KeepAliveTime>PT60S</tse:KeepAliveTime>"
SCOPE = "<tse:Scope/><tse:SearchFilter/><tse:IncludeStartState>true</tse:IncludeStartState>"
SEARCHES = {
    "FindRecordings": ("<tse:Scope/>", "GetRecordingSearchResults"),
    "FindEvents": (SPAN + SCOPE, "GetEventSearchResults"),
    "SearchImageByNLRequest": (f"{SPAN}<tse:Text>red</tse:Text>", "GetNLSearchResultsRequest"),
}
EMPTY = (
    "tds:GetCapabilities", "tds:GetServiceCapabilities", "tds:GetDeviceInformation",
    "tds:GetSystemDateAndTime", "tds:GetScopes", "tds:GetHostname", "tds:GetNetworkInterfaces",
    "tse:GetServiceCapabilities", "tse:GetRecordingSummary",
)  # fmt: skip
ABOUT = {
    **dict.fromkeys(EMPTY, ""),
    "tds:GetServices": "<tds:IncludeCapability>true</tds:IncludeCapability>",
    "tse:GetRecordingInformation": "<tse:RecordingToken>gate</tse:RecordingToken>",
    "tse:GetMediaAttributes": "<tse:Time>2026-09-21T14:30:00Z</tse:Time>",
}


@pytest.fixture(scope="module")
def schemas(tmp_path_factory):
    """The schemas of both services, by their namespaces.

    libxml2 takes no types that may go on with anything: those places are left out.
    """
    folder = tmp_path_factory.mktemp("published") / "wsdl"
    shutil.copytree(PUBLISHED.parent, folder)
    for file in (*folder.rglob("ver*/**/*.xsd"), *folder.rglob("ver*/**/*.wsdl")):
        anything = rb'<xs:any [^>]*minOccurs="0"[^>]*/>'
        file.write_bytes(re.sub(anything, b"", file.read_bytes()))
    found = {}
    for name in ("search.wsdl", "device/wsdl/devicemgmt.wsdl"):
        file = folder / "ver10" / name
        (schema,) = etree.parse(str(file)).iter(f"{XS}schema")
        whole = etree.fromstring(etree.tostring(schema), base_url=str(file))
        found[schema.get("targetNamespace")] = etree.XMLSchema(whole)
    return found


@pytest.mark.parametrize("has_people", [True, False])
def test_responses_are_valid(schemas, onvif, has_people):
    def response(name, body):
        """The element in the body of a valid response."""
        content = envelope(onvif, f"<{name}>{body}</{name}>")
        answer = httpx.post(f"{onvif.url}/onvif/search_service", content=content)
        assert answer.status_code == 200, answer.text
        found = etree.fromstring(answer.content)[0][0]
        schema = schemas[etree.QName(found).namespace]
        schema.assertValid(etree.fromstring(etree.tostring(found)))
        return found

    if not has_people:
        onvif.service.gallery.delete_where(Filter(camera=["gate", ODD]))
        onvif.service.current.last.has_changed()
    for name, body in ABOUT.items():
        if has_people or name != "tse:GetRecordingInformation":
            response(name, body)
    for name, (body, results) in SEARCHES.items():
        begun = response(f"tse:{name}", body + KEPT)
        token = f"<tse:SearchToken>{begun[0].text}</tse:SearchToken>"
        response("tse:GetSearchState", token)
        found = response(f"tse:{results}", token)[0]
        assert (found[0].text, len(found) > 1) == ("Completed", has_people)
        response("tse:EndSearch", token)
