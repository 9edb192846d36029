"""Connections to other machines with a time limit, logins in addresses, and SOAP's XML.

Cameras, the console and the Milvus store share it; the core opens no connection.
"""
