"""Extra [heif]: HEIC and AVIF photos, decoded in a process of their own."""
