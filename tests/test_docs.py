"""The pages: commands that parse, links that lead somewhere, settings and API as the source has them."""

import re
import shlex
import subprocess
import sys

import pytest
import yaml
from registries import registries_kept
from scripts import the_script
from short_runs import ROOT

from barrier_diffusers.utils.command_line import parse_config
from barrier_diffusers.workflow.sweep_file import read_sweep

sys.path.insert(0, str(ROOT / "docs"))

import write_reference

PAGES = [ROOT / "README.md", ROOT / "assets/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS_WEIGHTS = "# needs real weights"
LAUNCHERS = ("accelerate", "launch", "python", ".venv/bin/accelerate", ".venv/bin/python", "-m")
OTHERS = ("git", "cd", "kill", "pip", "wandb")  # programs that are not ours


def fenced(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def commands():
    """(page, words) of every command that is not marked as one that needs real weights."""
    for page in PAGES:
        for block in fenced(page, "bash"):
            if block.startswith(NEEDS_WEIGHTS):
                continue
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield page, words


COMMANDS = list(commands())


def test_there_are_commands():
    assert len(COMMANDS) > 15


def check_script(words):
    """A script and its arguments: the settings are complete and accepted."""
    name = words[0].removesuffix(".py").replace("/", ".")
    assert (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()
    if name.startswith(("benchmarks", "docs")):
        return
    _, settings = the_script(name.removeprefix("train_scripts."))
    config = parse_config(settings, words[1:]) if isinstance(settings, type) else settings(words[1:])
    if name.endswith(".sweep"):
        read_sweep(config.sweep)


def with_files_of(page, words, folder):
    """The words with paths of the files that the page shows: Python that begins with \"\"\"NAME.py: ..."""
    for block in fenced(page, "python"):
        for name in re.findall(r'^"""(\w+\.py):', block):
            (folder / name).write_text(block, encoding="utf-8")
            words = [str(folder / name) if word == name else word for word in words]
    return words


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{p.stem}: {' '.join(w)[:60]}" for p, w in COMMANDS])
def test_a_command_of_the_pages_is_valid(page, words, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    words = with_files_of(page, words, tmp_path)
    with registries_kept():
        check_command(words)


def check_command(words):
    """A program that there is, with settings that it accepts."""
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
        assert all(word in targets for word in words[1:] if "=" not in word and not word.startswith("-")), words
    elif words[0] == "sbatch":
        rest = [word for word in words[1:] if not word.startswith("--array")]
        assert (ROOT / rest[0]).is_file()
        check_script(rest[1:] if rest[0].endswith("run.sbatch") else ["train_scripts/sweep.py", *rest[1:]])
    elif words[0].endswith("pytest"):
        assert all((ROOT / word).is_file() for word in words[1:] if word.startswith("tests/"))
    elif words[0] in OTHERS:
        pass
    else:
        while words[0] in LAUNCHERS:
            words = words[1:]
        check_script(words)


def test_blocks_are_correct_shell_and_python():
    for page in PAGES:
        for block in fenced(page, "bash"):
            subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        for block in fenced(page, "python"):
            compile(block, str(page), "exec")


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not re.match(r"https?://|mailto:", target):
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_page_of_the_documentation_is_reachable():
    """From the README, over any number of links."""
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop().resolve()
        if page in seen or page.suffix != ".md" or not page.is_file():
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
        todo += [page.parent / target for target in links if not target.startswith("http")]
    tables = ROOT / "docs/tables"
    missing = [page for page in PAGES if page.resolve() not in seen and tables not in page.parents]
    assert not missing


def test_the_reference_is_what_the_source_says():
    for path, wanted in write_reference.pages().items():
        assert path.is_file() and path.read_text(encoding="utf-8") == wanted, f"{path.name}: run `make reference`"


def test_everything_public_has_a_docstring():
    silent = [
        f"{path.relative_to(ROOT)}: {name}"
        for modules in write_reference.api_pages().values()
        for path in modules
        for name, said in write_reference.entries(path)
        if not said
    ]
    assert not silent


def test_every_module_is_in_the_reference():
    listed = {path for modules in write_reference.api_pages().values() for path in modules} | {
        ROOT / "barrier_diffusers/__init__.py"
    }
    for folder in ("barrier_diffusers", "classification_ext", "ddpm_ext"):
        assert {path for path in (ROOT / folder).rglob("*.py")} - {ROOT / "barrier_diffusers/__init__.py"} <= listed


def python_sources():
    """Every Python file of the repository."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()]


def test_sections_of_the_method_that_code_cites_exist():
    sections = re.findall(r"^## (\d+)\. ", (ROOT / "docs/method.md").read_text(encoding="utf-8"), re.M)
    assert sections == [str(number) for number in range(1, 9)]
    cited = [
        (path, number)
        for path in python_sources()
        for number in re.findall(r"method\.md\s+section\s+(\d+)", path.read_text(encoding="utf-8"))
    ]
    assert len(cited) > 5
    assert not [(path.name, number) for path, number in cited if number not in sections]


def test_code_cites_no_page_that_is_not_there():
    wrong = re.compile(r"\bMETHOD(\.md)?\s+sections?\b|\(METHOD\b|\bMETHOD\.md\b|\bSETTINGS\.md\b|\bARCHITECTURE\b")
    this = ROOT / "tests/test_docs.py"
    found = [path.relative_to(ROOT) for path in python_sources() if path != this and wrong.search(path.read_text())]
    assert not found


def test_functions_that_the_method_names_exist():
    named = set(re.findall(r"\b([a-z_]+)\(\)", (ROOT / "docs/method.md").read_text(encoding="utf-8")))
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "barrier_diffusers").rglob("*.py"))
    assert len(named) > 6
    assert not [name for name in named if f"def {name}(" not in sources]


def made_by(config):
    """The output folder that a configuration file names."""
    return yaml.safe_load((ROOT / config).read_text(encoding="utf-8")).get("output_dir")


def recipes():
    """Target of the Makefile -> the folders that its commands write."""
    found, target = {}, None
    for line in (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if match := re.match(r"([a-z-]+):", line):
            target = match.group(1)
        elif line.startswith("\t"):
            folders = [made_by(config) for config in re.findall(r"--config (\S+\.yaml)", line)]
            found.setdefault(target, set()).update(filter(None, folders))
    return found


def folders_made(text):
    """The folders that commands in this text leave."""
    for config in re.findall(r"--config (\S+\.yaml)", text):
        if (ROOT / config).is_file():
            yield made_by(config)
    yield from re.findall(r"--output_dir (\S+)", text)
    for target in re.findall(r"make ([a-z-]+)", text):
        yield from recipes().get(target, ())


def folders_loaded(text):
    """(position, folder in runs/) of what code and commands in this text read."""
    for match in re.finditer(r"(?:pretrained|classifier|weights)\(\"(runs/[^\"]+)\"", text):
        if "save_pretrained" not in text[match.start() - 9 : match.end()]:
            yield match.start(), match.group(1)
    for match in re.finditer(r"(--\S+)((?: runs/[\w/]+)+)", text):
        if not match.group(1).startswith("--output"):
            yield from ((match.start(), folder) for folder in match.group(2).split())


@pytest.mark.parametrize("page", [page for page in PAGES if "api" not in page.parts], ids=lambda page: page.name)
def test_every_folder_that_is_loaded_is_made_above(page):
    text = page.read_text(encoding="utf-8")
    text = re.sub(
        rf"```bash\n{NEEDS_WEIGHTS}\n(.*?)```",
        lambda m: " ".join(re.findall(r"--output_dir \S+", m[0])),
        text,
        flags=re.S,
    )
    for position, folder in folders_loaded(text):
        assert folder in set(folders_made(text[:position])), f"{page.name} loads {folder}, which nothing above makes"
