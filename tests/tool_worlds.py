"""What each rank runs in the tests of accelerate() under distributed tools."""

from __future__ import annotations
