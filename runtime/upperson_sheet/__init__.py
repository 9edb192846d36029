"""Contact sheets: pictures of what a sentence found; the core finds it by its entry point."""
