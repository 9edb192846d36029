"""Connections to other machines with a time limit, and logins in addresses.

Cameras, the console and the Milvus store share it; the core opens no connection.
"""
