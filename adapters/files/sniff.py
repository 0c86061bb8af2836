"""What a file really is, judged by its first bytes, when it is not what its name promises.

Imports no torch.
"""

from __future__ import annotations


def describe(head: bytes) -> str | None:
    """Say what a weight file with these first bytes is instead, or None if they tell nothing."""
    if not head:
        return "the file is empty"
    text = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "this is a git-LFS pointer, not the file itself; fetch it with `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "this is an HTML or XML page, not the file itself; the download went wrong"
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "this is a pickled PyTorch checkpoint, which can run code when loaded; convert it"
    if head.startswith(b"GGUF"):
        return "this is a GGUF file; give its own path as the model"
    if head.startswith(b"\x1f\x8b"):
        return "this is a gzip archive; unpack it first"
    return None
