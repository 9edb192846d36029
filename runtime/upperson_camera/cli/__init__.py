"""Commands of the camera package."""
