"""docs/api.md: it is what signatures and docstrings say, and who changes one of them is told."""

import re

import pytest
import torch

import flash_cosine_sim_attention as library
from scripts import api

MODULES = {
    "flash_attn_interface": ["flash_attn_func", "flash_attn_varlen_func"],
    "functional": ["scaled_dot_product_attention"],
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A copy of the page, which the script then compares with."""
    page = tmp_path / "api.md"
    page.write_text(api.PAGE.read_text())
    monkeypatch.setattr(api, "PAGE", page)
    return page


def test_the_page_is_what_the_docstrings_say(capsys):
    assert api.main([]) == 0, capsys.readouterr().err


def test_every_public_function_has_a_heading_and_every_argument_a_line():
    page = api.PAGE.read_text()
    in_package = sorted(name for name in library.__all__ if name != "__version__")
    in_modules = [f"{module}.{name}" for module, names in MODULES.items() for name in names]
    assert re.findall("^## (.*)$", page, re.MULTILINE) == in_package + in_modules
    assert len(api.public_functions()) == len(in_package + in_modules)
    names = "q k v mask attn_bias scale groups causal window_size cu_seqlens_q max_seqlen_k backend return_partials"
    for name in names.split():
        assert re.search(rf"^- (`\w+`, )?`{name}`", page, re.MULTILINE), name
    for line in page.splitlines():
        assert not re.match(r" *[*+] |\d+[.)] ", line), f"Markdown takes for a list what is none: {line}"


def with_another_default(q, mask=True):
    """Attention.

    Args:
        q: (batch, seq_len).
        mask: bool.
    """


def with_another_word(q, mask=None):
    """Attention.

    Args:
        q: (batch, seq_len, head_dim).
        mask: bool.
    """


def original(q, mask=None):
    """Attention.

    Args:
        q: (batch, seq_len).
        mask: bool.
    """


@pytest.mark.parametrize("changed", [with_another_default, with_another_word])
def test_a_changed_signature_or_docstring_is_found_and_written(written, monkeypatch, capsys, changed):
    for function in (original, changed):
        monkeypatch.setattr(function, "__name__", "attention")
    monkeypatch.setattr(api, "public_functions", lambda: [original])
    assert api.main(["--write"]) == 0 and api.main([]) == 0
    before = written.read_text()
    monkeypatch.setattr(api, "public_functions", lambda: [changed])
    capsys.readouterr()
    assert api.main([]) == 2
    assert "docs/api.md is not what the docstrings say; --write makes it anew" in capsys.readouterr().err
    assert written.read_text() == before
    assert api.main(["--write"]) == 0 and api.main([]) == 0
    assert written.read_text() != before


def test_an_argument_without_a_description_is_an_error(written, monkeypatch, capsys):  # noqa: ARG001
    def attention(q, mask=None, causal=False):  # noqa: ARG001
        """Attention.

        Args:
            q: (batch, seq_len).
            mask: bool.
        """

    monkeypatch.setattr(api, "public_functions", lambda: [attention])
    assert api.main(["--write"]) == 2
    assert "attention must describe its arguments q, mask, causal, got q, mask" in capsys.readouterr().err


def test_like_another_function_leaves_its_arguments_to_that():
    def plain(q, v):  # noqa: ARG001
        """Like original, but plainer."""

    with pytest.raises(ValueError, match="plain must describe its arguments v, got none"):
        api.check_arguments(plain, [original, plain])
    plain.__doc__ += "\n\nArgs:\n    v: (batch, seq_len)."
    api.check_arguments(plain, [original, plain])


def test_the_signature_on_the_page_is_pythons():
    (text,) = re.findall(r"## l2norm_tensors\n\n```py\n(.*?)\n```", api.PAGE.read_text(), re.DOTALL)
    names = {"Tensor": torch.Tensor}
    exec(f"def {text}: ...", names)
    assert names["l2norm_tensors"].__annotations__ == library.l2norm_tensors.__annotations__
