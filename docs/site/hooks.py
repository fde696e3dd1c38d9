"""What mkdocs needs beyond docs/: README as front page, examples, the reference from docstrings, formulas as MathML."""

import ast
import html
import re
import tomllib
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
# Files that become pages.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
EXAMPLES = {f"docs/examples/{path.name}": f"examples/{path.stem}.md" for path in ROOT.glob("docs/examples/*.py")}
REFERENCE = {
    "flexmsa": "flexmsa",
    "metrics": "flexmsa.metrics",
    "plotting": "flexmsa.plotting",
    "distributed": "flexmsa.distributed",
    "transformers": "flexmsa.integrations.transformers",
    "testing": "flexmsa.testing",
}
# Code has brackets too: it is matched first, and left as it is.
LINK = re.compile(r"^ *```.*?^ *```|`[^`\n]*`|(?<=\]\()(?!#|[a-z]+:)(?P<target>[^)#\s]+)", re.DOTALL | re.MULTILINE)
LINKED = re.compile(r"(?<!!)\[([^\]]+)\]\(\x00[^)]*\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)
FUNCTION = re.compile(r"<m[io]>(log|ln|max)</m[io]>")
UNKNOWN = re.compile(r"<m[io]>(&|\\[a-zA-Z]*)</m[io]>")
PRIME = re.compile(r"<mi>(?:&#x02032;|\u2032)</mi>")


def on_files(files, config):
    """Add the pages that are not in docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for source, page in EXAMPLES.items():
        files.append(File.generated(config, page, content=example(ROOT / source)))
    for page, module in REFERENCE.items():
        files.append(File.generated(config, f"reference/{page}.md", content=reference(module)))
    return files


def example(path: Path) -> str:
    """The page of a program: its docstring, then its code."""
    code = path.read_text()
    said = ast.get_docstring(ast.parse(code))
    body = code.split('"""', 2)[2].strip()
    return f"# {path.stem.replace('_', ' ').capitalize()}\n\n{said}\n\n```python\n{body}\n```\n"


def reference(module: str) -> str:
    """The page of a module: a directive for each name of its `__all__`, in that order."""
    file = ROOT.joinpath(*module.split("."))
    tree = ast.parse((file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text())
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    names = next(node.value for node in assigned if ast.unparse(node.targets[0]) == "__all__")
    public = [name for name in ast.literal_eval(names) if f"{module}.{name}" not in REFERENCE.values()]
    # Beside a module of the same name, a function is asked for by its full name.
    sources = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    places = (f"{module}.{name}" for name in public)
    full = (f"{place}.{name}" if place in sources else place for place, name in zip(places, public, strict=True))
    return "\n\n".join([f"# {module}", *(f"::: {place}" for place in full)]) + "\n"


def on_page_markdown(markdown, page, config, files):
    """Let links to files of the repository lead to their page, or to the repository."""
    sources = {page: source for source, page in (PAGES | EXAMPLES).items()}
    source = PurePosixPath(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    return rewrite_links(markdown, source, page.file.src_uri, repository())


def repository() -> str | None:
    """The address of the files of the repository, if pyproject.toml names one."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    address = next((urls[name] for name in ("Repository", "Source", "Homepage") if name in urls), None)
    return address and address.rstrip("/") + "/blob/main"


def rewrite_links(markdown: str, source: PurePosixPath, page: str, address: str | None) -> str:
    """Return a page whose links fit its place on the site.

    Args:
        source: its path in the repository, which its links are relative to.
        page: its path on the site.
        address: where the repository's files are; None turns links to them into plain text.
    """
    if address:
        # README has full links where PyPI shows it.
        up = relpath(".", str(source.parent))
        markdown = markdown.replace(f"]({address}/", f"]({up}/")

    def place(link: re.Match) -> str:
        if not link["target"]:
            return link[0]
        target = normpath(source.parent / link["target"])
        if own := PAGES.get(target) or EXAMPLES.get(target):
            return relpath(own, str(PurePosixPath(page).parent))
        if target.startswith("docs/") and (ROOT / target).is_file():
            return relpath(target.removeprefix("docs/"), str(PurePosixPath(page).parent))
        return f"{address}/{target}" if address else "\x00"

    return LINKED.sub(r"\1", LINK.sub(place, markdown))


def on_page_content(content, page, config, files):
    """Turn formulas into MathML, which browsers draw by themselves."""
    return FORMULA.sub(lambda found: formula(found[2], found[1] == "div"), content)


def formula(latex: str, displayed: bool) -> str:
    """MathML of a formula, in a box that scrolls where it is displayed apart.

    >>> formula("x^2", False)[:40]
    '<math xmlns="http://www.w3.org/1998/Math'
    """
    # The converter knows align*, which GitHub does not draw within a block.
    latex = html.unescape(latex).strip().replace("{aligned}", "{align*}")
    drawn = convert(latex, display="block" if displayed else "inline")
    if unknown := UNKNOWN.search(drawn):
        raise ValueError(f"formula: expected LaTeX that latex2mathml knows, got {unknown[1]} in {latex}")
    # As operators, names of functions and primes get their space and their size; infinity is none.
    drawn = FUNCTION.sub(r'<mo lspace="0.17em" rspace="0.17em">\1</mo>', drawn)
    drawn = PRIME.sub("<mo>&#x02032;</mo>", drawn).replace("<mo>&#x0221E;</mo>", "<mi>&#x0221E;</mi>")
    return f'<div class="formula">{drawn}</div>' if displayed else drawn
