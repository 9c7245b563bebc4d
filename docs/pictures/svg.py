"""Just enough SVG: shapes and text with one palette, written as one file."""

import html
import pathlib

INK, MUTED, LINE, PAPER, FAINT = "#1b1b1f", "#6b6b76", "#e4e4e8", "#ffffff", "#f4f4f7"
TEXT, OWN, PICK = "#2f8f6b", "#2563c9", "#d9480f"  # captions, the own shot, picked chunks
FONT = "Inter, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"


def number(x: float) -> str:
    """x with at most two decimals."""
    return f"{x:.2f}".rstrip("0").rstrip(".")


class Picture:
    """Shapes on a card with round corners; sizes are in pixels, y grows downwards."""

    def __init__(self, width: int, height: int, title: str):
        self._head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="{FONT}" role="img"><title>{html.escape(title)}</title>'
        )
        self._parts: list[str] = []
        self.box(0.5, 0.5, width - 1, height - 1, PAPER, radius=12, stroke=LINE)

    def add(self, name: str, content: str = "", **attributes: object) -> None:
        """An element; `stroke_width=2` becomes stroke-width="2"."""
        shown = " ".join(
            f'{key.replace("_", "-")}="{number(value) if isinstance(value, float) else value}"'
            for key, value in attributes.items()
            if value is not None
        )
        self._parts.append(f"<{name} {shown}>{content}</{name}>" if content else f"<{name} {shown}/>")

    def box(self, x, y, width, height, fill, *, radius=0.0, stroke=None, **more) -> None:
        """A rectangle."""
        rounded = {"rx": float(radius)} if radius else {}
        place = {"x": float(x), "y": float(y), "width": float(width), "height": float(height)}
        self.add("rect", **place, **rounded, fill=fill, stroke=stroke, **more)

    def path(self, d: str, *, fill="none", stroke=None, width=1.0, **more) -> None:
        """An outline or an area, by SVG's path commands."""
        self.add("path", d=d, fill=fill, stroke=stroke, stroke_width=width if stroke else None, **more)

    def line(self, x1, y1, x2, y2, colour=LINE, width=1.0, **more) -> None:
        """A straight line."""
        self.path(f"M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}", stroke=colour, width=width, **more)

    def text(self, x, y, text, *, size=12, colour=INK, anchor="start", bold=False, mono=False, **more) -> None:
        """One line of text, its baseline at y."""
        font = {"font-family": "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"} if mono else {}
        style = {"font-weight": "bold"} if bold else {}
        where = {"x": float(x), "y": float(y), "text-anchor": None if anchor == "start" else anchor}
        self.add("text", html.escape(text), **where, **font, **style, font_size=size, fill=colour, **more)

    def save(self, path: pathlib.Path) -> None:
        """Writes the file."""
        path.write_text("\n".join([self._head, *self._parts, "</svg>"]) + "\n")
