"""The ONVIF search service over the console's searches. A camera of the gallery is a recording.

`soap` reads requests, `security` authenticates them, `device` and `recordings` have the operations,
`sessions` the searches under way, and `routes` the addresses.
"""
