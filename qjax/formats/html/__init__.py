"""Writes what is known of a program as one page of HTML."""

from qjax.formats.html.page import write_html

__all__ = ("write_html",)
