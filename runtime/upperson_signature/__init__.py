"""Signatures of bundles and exports; a bundle that is trusted finds it by its entry point."""
