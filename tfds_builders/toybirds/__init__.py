"""Toybirds: drawn birds whose species differ only in small parts."""
