"""Where the suite's time goes: CPU seconds of each test, and a table of them by file.

tests/conftest.py loads this as a plugin: a run with `--junitxml FILE` writes a property `cpu_seconds` for every test,
including its fixtures and the processes that it waited for. Seconds on the wall depend on what else runs, these less.

    ./launch.sh test --junitxml times.xml
    python -P tests/cpu_seconds.py times.xml [more.xml …] [--write docs/testing.md]
"""

import argparse
import collections
import os
import pathlib
import xml.etree.ElementTree as ElementTree

import pytest

BEGIN, END = "<!-- written by tests/cpu_seconds.py -->", "<!-- end -->"


def _spent() -> float:
    """CPU seconds, user's and system's, of this process and of all its children that have ended."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    item._cpu_began = _spent()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    if call.when == "teardown":
        item.user_properties.append(("cpu_seconds", round(_spent() - item._cpu_began, 2)))
    return (yield)


def table(files: list[pathlib.Path], shown: float = 10.0) -> str:
    """Markdown: a row for each test file above `shown` CPU seconds, the dearest first, one for the rest, the sum."""
    tests, seconds = collections.Counter(), collections.Counter()
    dearest: dict[str, tuple[float, str]] = {}
    for file in files:
        for case in ElementTree.parse(file).iter("testcase"):
            spent = sum(float(p.get("value", 0)) for p in case.iter("property") if p.get("name") == "cpu_seconds")
            name = case.get("classname", "").replace(".", "/") + ".py"
            tests[name] += 1
            seconds[name] += spent
            function = case.get("name", "").split("[")[0]
            dearest[name] = max(dearest.get(name, (0.0, "")), (spent, function))
    rows = ["| file | tests | CPU seconds | dearest test | its seconds |", "|---|--:|--:|---|--:|"]
    few = [name for name in seconds if seconds[name] < shown]
    for name, spent in seconds.most_common():
        if name not in few:
            most, function = dearest[name]
            rows.append(f"| `{name}` | {tests[name]} | {spent:.0f} | `{function}` | {most:.0f} |")
    rest = sum(seconds[name] for name in few)
    rows.append(f"| {len(few)} more files | {sum(tests[name] for name in few)} | {rest:.0f} | | |")
    rows.append(f"| **all** | {tests.total()} | {seconds.total():.0f} | | |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="A table of CPU seconds by test file, from junit files of pytest.")
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    parser.add_argument("--write", type=pathlib.Path, help="put the table between its marks in this page")
    arguments = parser.parse_args()
    text = table(arguments.files)
    if arguments.write:
        page = arguments.write.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        text = f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"
        arguments.write.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
