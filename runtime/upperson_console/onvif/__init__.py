"""The ONVIF search service: recordings searched by sentence and by picture, over SOAP.

A camera of the gallery is a recording. `soap` reads requests and `security` tells who sends them;
`device` and `recordings` say what can be asked, in `sessions` that hand out each result once;
`routes` puts it on the network.
"""
