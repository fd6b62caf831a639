"""In our pages `<u, v>` is an inner product, which Python-Markdown would take for a tag and pass on unseen."""

from __future__ import annotations

from typing import Any

from markdown import Extension, Markdown


class InnerProducts(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.deregister("html")


def on_config(config: Any) -> None:
    config.markdown_extensions.append(InnerProducts())
