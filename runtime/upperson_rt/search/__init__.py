"""Search: one path from a `SearchRequest` to a `SearchResult`."""
