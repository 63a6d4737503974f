"""Counts that show the shape of the package, for docs/architecture.md.

    python scripts/house.py

The exit code is 1 where a count that must be zero is not. Import circles come from import-linter's graph; `late` ones
count imports inside functions and under TYPE_CHECKING, too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from pathlib import Path

import grimp
import networkx

PACKAGE = Path(__file__).parents[1] / "cv_lightning"
APPS = ("commands", "digits", "factory", "planner", "viewer")
PRIVATE = re.compile(
    r"\btrainer\.(\w+\.)*_[a-z]\w*|\b(fit_loop|epoch_loop|strategy)\._[a-z]\w*|_connector\b|getattr\(trainer[\w.]*, \"_"
)
"""Reads of what Lightning keeps to itself; methods that subclasses of LightningCLI override are not meant."""
LONG_FUNCTION, LONG_FILE = 65, 500


def circles(with_type_checking: bool, top_level: set[tuple[str, str]] | None = None) -> int:
    """Groups of modules that import each other; with `top_level`, by these imports alone."""
    graph = grimp.build_graph(PACKAGE.name, exclude_type_checking_imports=not with_type_checking, cache_dir=None)
    edges = {(name, other) for name in graph.modules for other in graph.find_modules_directly_imported_by(name)}
    chosen = edges if top_level is None else edges & top_level
    return sum(len(group) > 1 for group in networkx.strongly_connected_components(networkx.DiGraph(chosen)))


def imported_at_the_top(trees: dict[Path, ast.Module]) -> set[tuple[str, str]]:
    """Pairs of modules of which the first imports the second when it is loaded."""
    pairs = set()
    for path, tree in trees.items():
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.module:
                pairs.add((name, node.module))
                pairs |= {(name, f"{node.module}.{alias.name}") for alias in node.names}
            elif isinstance(node, ast.Import):
                pairs |= {(name, alias.name) for alias in node.names}
    return pairs


def is_callback(node: ast.stmt) -> bool:
    """True for a class that extends one of Lightning's callbacks."""
    bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
    return any(word in base for base in bases for word in ("Callback", "ProgressBar", "Checkpoint"))


def main() -> int:
    """Print the counts."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    lines = {path: len(text.splitlines()) for path, text in texts.items()}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    classes = Counter(node.name for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef))
    callbacks = [tree for path, tree in trees.items() if path.parent.name == "callbacks" and path.stem != "__init__"]
    lengths = [
        (node.end_lineno or node.lineno) - node.lineno + 1
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    zero = {
        "public class names used twice": sum(n > 1 for name, n in classes.items() if not name.startswith("_")),
        "modules in callbacks/ without a callback": sum(not any(map(is_callback, tree.body)) for tree in callbacks),
        "import circles at run time": circles(False, imported_at_the_top(trees)),
        "import circles through late or typing imports": circles(True),
        "private attributes of Lightning that are read": sum(len(PRIVATE.findall(text)) for text in texts.values()),
        f"files above {LONG_FILE} lines": sum(n > LONG_FILE for n in lines.values()),
        "functions above 120 lines": sum(n > 120 for n in lengths),
    }
    short = sum(n <= LONG_FUNCTION for n in lengths)
    in_apps = sum(n for path, n in lines.items() if path.relative_to(PACKAGE).parts[0] in APPS)
    other = {
        "lines of the library rooms": sum(lines.values()) - in_apps,
        "lines of the applications": in_apps,
        "lines above 110 characters": sum(len(line) > 110 for text in texts.values() for line in text.splitlines()),
        f"functions up to {LONG_FUNCTION} lines, of all": f"{short / len(lengths):.1%}",
    }
    for name, value in (zero | other).items():
        print(f"{name}: {value}")
    return int(any(zero.values()))


if __name__ == "__main__":
    sys.exit(main())
