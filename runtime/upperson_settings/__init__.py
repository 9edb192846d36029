"""Files of settings: YAML, of cameras, the console and recipes."""
