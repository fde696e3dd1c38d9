"""The site: links of pages outside docs/, formulas, and docstrings as griffe reads them."""

import doctest
import importlib.util
from pathlib import Path, PurePosixPath

import pytest

for needed in ("mkdocs", "mkdocstrings", "latex2mathml"):
    pytest.importorskip(needed)

SITE = Path(__file__).parents[1] / "docs" / "site"
ADDRESS = "https://example.org/flexmsa/blob/main"


def load(name):
    spec = importlib.util.spec_from_file_location(name, SITE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load("hooks")


@pytest.mark.parametrize(
    ("link", "source", "page", "expected"),
    [
        ("[a](docs/api.md#training)", "README.md", "index.md", "[a](api.md#training)"),
        ("![a](docs/images/cpu.png)", "README.md", "index.md", "![a](images/cpu.png)"),
        ("[a](CONTRIBUTING.md)", "README.md", "index.md", "[a](contributing.md)"),
        ("[a](../README.md#how-fast)", "docs/install.md", "install.md", "[a](index.md#how-fast)"),
        ("[a](../../CHANGELOG.md)", "docs/notes/kernels.md", "notes/kernels.md", "[a](../changelog.md)"),
        ("[a](examples/own_gpt.py)", "docs/training.md", "training.md", "[a](examples/own_gpt.md)"),
        ("[a](../math.md)", "docs/notes/kernels.md", "notes/kernels.md", "[a](../math.md)"),
        ("[a](../flexmsa/cache.py)", "docs/api.md", "api.md", f"[a]({ADDRESS}/flexmsa/cache.py)"),
        ("[a](../benchmarks/results)", "docs/api.md", "api.md", f"[a]({ADDRESS}/benchmarks/results)"),
        (f"[a]({ADDRESS}/docs/api.md#x)", "README.md", "index.md", "[a](api.md#x)"),
        (
            "```py\nlayers[0](x)\n```\n`layers[0](x)`",
            "README.md",
            "index.md",
            "```py\nlayers[0](x)\n```\n`layers[0](x)`",
        ),
        ("[a](https://pytorch.org) [b](#c)", "README.md", "index.md", "[a](https://pytorch.org) [b](#c)"),
    ],
)
def test_links_fit_the_site(link, source, page, expected):
    assert hooks.rewrite_links(link, PurePosixPath(source), page, ADDRESS) == expected


def test_links_to_the_repository_are_text_while_it_has_no_address():
    text = "See [the `cache`](../flexmsa/cache.py) and [the API](api.md)."
    found = hooks.rewrite_links(text, PurePosixPath("docs/math.md"), "math.md", None)
    assert found == "See the `cache` and [the API](api.md)."


def test_formulas_become_mathml():
    page = '<p><span class="arithmatex">\\(a &lt; \\log_2 b\\)</span></p><div class="arithmatex">\\[\nx\\]</div>'
    found = hooks.on_page_content(page, None, None, None)
    assert "arithmatex" not in found and found.count("<math") == 2
    assert '<div class="formula"><math' in found and 'display="block"' in found
    assert "&amp;" not in found and ">log</mo>" in found


def test_equations_are_aligned():
    assert hooks.formula(r"\begin{aligned} a &= b \\ c &= d \end{aligned}", True).count("<mtr>") == 2


@pytest.mark.parametrize("latex", [r"a & b", r"\unheard x"])
def test_a_formula_that_would_be_drawn_wrong_raises(latex):
    with pytest.raises(ValueError, match="formula: expected LaTeX that latex2mathml knows"):
        hooks.formula(latex, True)


def test_each_public_name_has_an_entry():
    page = hooks.reference("flexmsa")
    assert page.startswith("# flexmsa\n") and "::: flexmsa.attention\n" in page
    # The metrics have a page of their own.
    assert "::: flexmsa.metrics" not in page
    # The function, not the module.
    name = "flexmsa.integrations.transformers"
    assert f"::: {name}.convert.convert\n" in hooks.reference(name)


@pytest.mark.parametrize("name", ["hooks", "docstrings"])
def test_the_examples(name):
    tried = doctest.testmod(load(name))
    assert tried.attempted and not tried.failed
