"""A hit as a result of a search by sentence or picture."""

import json
import uuid
from xml.etree.ElementTree import Element

from upperson_console.onvif.device import Address
from upperson_console.onvif.inventory import token_of
from upperson_console.onvif.soap import SCHEMA, element, elements, time_text
from upperson_rt.gallery import Hit


def key_of(hit: Hit) -> uuid.UUID:
    """Return the id of a track, or of a picture without one; the same in every search."""
    item = hit.item
    name = ("track", item.camera, item.track) if item.track is not None else ("picture", item.key)
    return uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(name))


def result_of(key: uuid.UUID, hit: Hit, similarity: float, address: Address) -> Element:
    """Return a hit as a result of either kind of search, whose types have the same fields."""
    values = {
        "ObjectUUID": str(key),
        "TargetImageURI": address.picture(hit.id),
        "Time": time_text(hit.item.time or 0.0),
        "Similarity": f"{similarity:.6g}",
        "RecordingToken": token_of(hit.item.camera or ""),
    }
    return element(SCHEMA, "Result", *elements(SCHEMA, values))
