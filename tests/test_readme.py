"""The README is true: its commands parse, its files, pictures and links exist."""

import ast
import importlib
import io
import re
import shlex
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MODULES = ("sample", "train", "metrics", "shapes")
pytestmark = pytest.mark.skipif(not README.is_file(), reason="there is no README.md yet")
TEXT = README.read_text(encoding="utf-8") if README.is_file() else ""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = ("", "sh", "bash", "shell", "console")
PROSE = FENCE.sub("", TEXT)


def commands():
    """The lines of shell code blocks that start with python or pip, as lists of words."""
    blocks = [code for language, code in FENCE.findall(TEXT) if language in SHELL]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.strip().removeprefix("$ ") for line in lines]
    lines = [re.sub(r"^(\w+=\S+ )+", "", line) for line in lines]  # variables set for the command
    return [shlex.split(s, comments=True) for s in lines if re.match(r"(python3?|pip3?) ", s)]


def links(pattern):
    """Targets of the links, or pictures, that point into this repository: (text, path, anchor)."""
    found = [(text, *target.partition("#")[::2]) for text, target in re.findall(pattern, PROSE)]
    return [link for link in found if not re.match(r"\w+:", link[1])]


PICTURES = links(r"!\[([^\]]*)\]\(([^)\s]+)[^)]*\)")
PICTURES += links(r"<(img)[^>]*?\ssrc=[\"']?([^\"'\s>]+)")
LINKS = links(r"(?<!!)\[((?:[^\[\]]|!\[[^\]]*\])*)\]\(([^)\s]+)[^)]*\)")
LINKS += links(r"<(a)\s[^>]*?href=[\"']?([^\"'\s>]+)")
LINKS += links(r"(?m)^\[([^\]]+)\]:\s*(\S+)")


def file_map():
    """The names that start the lines of the table, list or tree that says what each file is for."""
    name = re.compile(r"^[\s|*`\[│├└─-]*([\w./-]+)")
    for block in re.split(r"\n\s*\n|^```\w*$", TEXT, flags=re.MULTILINE):
        starts = [m[1] for m in map(name.match, block.splitlines()) if m]
        if {f"{module}.py" for module in MODULES} <= set(starts):
            return [start for start in starts if "." in start.strip("./-") or start.endswith("/")]
    return []


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_parse(words):
    program, *arguments = words
    if program.startswith("pip"):
        assert arguments[0] == "install"
        files = [after for flag, after in zip(arguments, arguments[1:]) if flag == "-r"]
        assert all((ROOT / file).is_file() for file in files)
    elif arguments[0] == "-m":
        assert arguments[1] in ("pytest", "venv", "pip")
    else:
        script, *arguments = arguments
        assert (ROOT / script).is_file(), f"there is no {script}"
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        if not hasattr(module, "parse_args"):
            assert not arguments, f"{script} takes no arguments"
            return
        try:
            module.parse_args(arguments)
        except SystemExit as stop:
            assert stop.code == 0, f"{script} does not understand {arguments}"


def test_the_first_commands_are_there():
    found = [" ".join(words) for words in commands()]
    assert "pip install -r requirements.txt" in found and "python -m pytest" in found
    for module in ("sample", "train", "metrics"):
        assert any(command.startswith(f"python {module}.py ") for command in found), module


def test_files_that_commands_read_exist():
    """The shipped model is named in commands; what training would write does not exist yet."""
    for words in commands():
        for word in words:
            if word.startswith(("pretrained/", "assets/", "experiments/", "tests/")):
                assert (ROOT / word).exists(), f"there is no {word}"


def test_the_file_map_is_complete():
    listed = file_map()
    assert listed, "no table or list of the files"
    assert [name for name in listed if not (ROOT / name).exists()] == []
    assert {path.name for path in ROOT.glob("*.py")} <= set(listed)


def lines_of_code(path):
    """Lines that are neither blank nor comments nor docstrings."""
    source, lines = path.read_text(), set()
    kinds = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in kinds and token.string.strip():
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize("path, said", re.findall(r"(?m)^\| \[(\w+\.py)\]\S+ \| (\d+) \|", TEXT))
def test_the_lines_of_code_are_those_of_the_table(path, said):
    assert int(said) == pytest.approx(lines_of_code(ROOT / path), rel=0.05)


def test_it_is_short():
    assert len(TEXT.split()) <= 2300


@pytest.mark.parametrize("path", sorted({path for _, path, _ in PICTURES}))
def test_pictures_exist(path):
    assert path.startswith("assets/"), f"{path} is not in assets/"
    assert (ROOT / path).is_file(), f"there is no {path}"


def heading_anchors():
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"(?m)^#+\s+(.+?)\s*$", PROSE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("text, path, anchor", LINKS, ids=lambda part: part or "-")
def test_links_point_to_something(text, path, anchor):
    """A link `name` to a Python file must lead to where this name is defined."""
    target = ROOT / path if path else README
    assert target.resolve().is_relative_to(ROOT), f"{path} leads out of the repository"
    assert target.exists(), f"there is no {path}"
    name = re.fullmatch(r"`(?:\w+\.)*(\w+)(?:\(\))?`", text)
    if name and path.endswith(".py"):
        defined = rf"(?m)^\s*(def|class) {name[1]}\b|^{name[1]}\b.* = "
        assert re.search(defined, target.read_text(encoding="utf-8")), f"{path} has no {name[1]}"
    assert not (anchor and path.endswith(".py")), "line numbers move: link to the file"
    if anchor and target == README:
        assert anchor in heading_anchors(), f"no heading for #{anchor}"


def test_no_personal_paths_and_nothing_to_fill_in():
    personal = r"(?<![\w.])/(?:home|Users|root|work|mnt)/|\b[A-Z]:\\|~/"
    assert re.findall(personal, TEXT) == []
    assert re.findall(r"@[A-Z]+@|#L0\b|\bTODO\b|\bFIXME\b", TEXT) == []
