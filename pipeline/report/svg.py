"""SVG that may stand on a page: nothing in it runs, asks the network, or changes the page around it.

A drawing is taken apart and built anew from a list of allowed elements, attributes and values, those that matplotlib writes.
What is not on the list is left out with its content. So it does not matter whether a figure was drawn here or came from
somebody else's folder, and an HTML parser and an XML parser read the same.
"""

import re
import xml.etree.ElementTree as ET

_SVG, _LINKS = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_LEAVES = {"path", "rect", "circle", "ellipse", "line", "polyline", "polygon", "image"}
_ELEMENTS = _LEAVES | {
    "svg", "g", "defs", "use", "text", "tspan", "clipPath", "pattern", "linearGradient", "radialGradient", "stop", "filter",
    "feComposite", "feColorMatrix",
}  # fmt: skip
# Attributes and properties of a style. Not among them: class, on*, and what could place a drawing over the page.
_NAMES = {
    "id", "d", "x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "rx", "ry", "dx", "dy", "width", "height", "points",
    "viewBox", "version", "preserveAspectRatio", "transform", "offset", "type", "in", "in2", "operator", "k1", "k2", "k3", "k4",
    "values", "result", "filter", "clip-path", "clip-rule", "opacity", "shape-rendering", "image-rendering", "stop-color",
    "stop-opacity", "text-anchor", "gradientUnits", "gradientTransform", "patternUnits", "patternTransform", "clipPathUnits",
}  # fmt: skip
_FAMILIES = ("fill", "stroke", "font")
_FUNCTIONS = {"translate", "scale", "rotate", "matrix", "skewX", "skewY", "rgb", "rgba"}
_CALL = re.compile(r"([\w-]*)\(")
_WITHIN = re.compile(r"url\(#[\w.-]+\)")
_PNG = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=\s]*")
_NO_TEXT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]"
)  # in no XML; names of classes may have them
_MOST_LEVELS = 30


def drawing(svg: str) -> str:
    """Return a drawing without anything that is more than a drawing.

    Args:
        svg: One SVG element.

    Raises:
        ValueError: It is not one well-formed SVG element, or it declares entities.
    """
    if "<!DOCTYPE" in svg:
        raise ValueError("a figure declares a document type")
    try:
        root = ET.fromstring(_NO_TEXT.sub("\ufffd", svg))
    except (ET.ParseError, ValueError) as error:
        raise ValueError(f"a figure is no SVG: {error}") from None
    if root.tag != f"{{{_SVG}}}svg":
        raise ValueError("a figure is no SVG")
    leaves = {e.get("id", "") for e in root.iter() if _name(e) in _LEAVES}
    built = _built(root, leaves, _MOST_LEVELS)
    built.attrib = {"xmlns": _SVG, "xmlns:xlink": _LINKS, **built.attrib}
    return ET.tostring(built, encoding="unicode")


def _name(element: ET.Element) -> str:
    return element.tag.removeprefix(f"{{{_SVG}}}") if isinstance(element.tag, str) else ""


def _built(element: ET.Element, leaves: set[str], levels: int) -> ET.Element:
    name = _name(element)
    built = ET.Element(name, dict(_attributes(element, name, leaves)))
    if name in ("text", "tspan"):
        built.text = element.text
    for child in element if levels else ():
        if _name(child) in _ELEMENTS - {"svg"}:
            built.append(_built(child, leaves, levels - 1))
            built[-1].tail = child.tail if name in ("text", "tspan") else None
    return built


def _attributes(element: ET.Element, name: str, leaves: set[str]) -> list[tuple[str, str]]:
    found = []
    for key, value in element.attrib.items():
        if key in ("href", f"{{{_LINKS}}}href"):
            # A `use` of a group could use further groups, and so draw without end.
            if _PNG.fullmatch(value) if name == "image" else name == "use" and value[:1] == "#" and value[1:] in leaves:
                found.append(("xlink:href", value))
        elif key == "style":
            properties = [part.partition(":") for part in value.split(";")]
            kept = [f"{p.strip()}: {v.strip()}" for p, _, v in properties if _allowed(p.strip(), v)]
            found += [("style", "; ".join(kept))] if kept else []
        elif _allowed(key, value):
            found.append((key, value))
    return found


def _allowed(key: str, value: str) -> bool:
    """Whether a value is plain: no escapes, and no functions but those of colours, places and parts of the drawing itself."""
    rest = _WITHIN.sub("", value)
    known = key in _NAMES or key.startswith(_FAMILIES)
    return known and "\\" not in rest and "/*" not in rest and _FUNCTIONS.issuperset(_CALL.findall(rest))
