"""Bridges to other libraries, each a module that imports its library; nothing is imported here."""
