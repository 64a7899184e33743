"""The Python files of an exported folder: our own network and samplers, in one file each, that import nothing of ours.

They are put together from the source of the modules that `sample` runs, so that both draw the same images.
"""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

NETWORK_MODULE, PIPELINE_MODULE = "maskfed_network", "maskfed_pipeline"
_TEMPLATES = Path(__file__).parent / "templates"

_Parts = dict[str, frozenset[str]]
_NETWORK: _Parts = {
    "shared.errors": frozenset(),
    "shared.diffusion.patches": frozenset({"patchify", "unpatchify"}),
    "shared.diffusion.uvit": frozenset(
        {"Positions", "Attention", "_attend", "Mlp", "Block", "UViT", "timestep_embedding"}
    ),
    "shared.diffusion.unet": frozenset(),
}
_PIPELINE: _Parts = {
    "shared.errors": frozenset(),
    "shared.seeding": frozenset({"SEED_BITS", "WORDS", "derive_key", "derive_seed", "generator", "_encode"}),
    "shared.experiment.wavelet_filters": frozenset(),
    "shared.diffusion.dwt": frozenset({"from_network", "highest", "idwt", "inverse_haar", "_synthesise"}),
    "shared.diffusion.patches": frozenset({"patchify", "unpatchify", "patchify_groups", "unpatchify_groups"}),
    "shared.diffusion.schedule": frozenset(),
    "shared.diffusion.samplers": frozenset(),
    "shared.diffusion.sampling": frozenset(),
    "shared.storage.synthetic_mark": frozenset(
        {
            *("SourceType", "VOCABULARY", "XMP_KEYWORD", "MODEL_KEYWORD", "SyntheticMark", "seed_range"),
            *("png_entries", "_packet"),
        }
    ),
}
"""Modules and the names that are taken from them; an empty set means all."""


def network_code() -> str:
    """The file beside the weights: the network as a model of diffusers."""
    return _one_file(_NETWORK, NETWORK_MODULE)


def pipeline_code() -> str:
    """The file beside `model_index.json`: schedule, samplers and the pipeline."""
    return _one_file(_PIPELINE, PIPELINE_MODULE)


def _one_file(parts: _Parts, template: str) -> str:
    texts = [_source(module) for module in parts] + [(_TEMPLATES / f"{template}.py.txt").read_text(encoding="utf-8")]
    trees = [ast.parse(text) for text in texts]
    imports = {ast.unparse(node) for tree in trees for node in tree.body if _is_foreign_import(node)}
    kept = [
        "\n".join(_pieces(text, tree, wanted))
        for text, tree, wanted in zip(texts, trees, [*parts.values(), frozenset[str]()], strict=True)
    ]
    head = ast.get_docstring(trees[-1])
    # Annotations stay text: some name classes that are not taken along.
    return "\n".join(
        (f'"""{head}\n"""', "", "from __future__ import annotations", "", *sorted(imports), "", "", *kept, "")
    )


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def _is_foreign_import(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return not (node.module or "").startswith("shared")
    return isinstance(node, ast.Import)


def _pieces(text: str, tree: ast.Module, wanted: frozenset[str]) -> Iterator[str]:
    """The lines of each statement that defines one of `wanted`, with the comments above it and its description."""
    lines, keep = text.splitlines(), False
    for node in tree.body[1:]:
        if isinstance(node, ast.Expr):
            if keep:
                yield "\n".join(lines[node.lineno - 1 : node.end_lineno])
            continue
        names = _defined(node)
        keep = bool(names) and (not wanted or bool(names & wanted))
        if keep:
            first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]) - 1
            while lines[first - 1].startswith("#"):
                first -= 1
            blank = "\n\n" if isinstance(node, ast.FunctionDef | ast.ClassDef) else ""
            yield blank + "\n".join(lines[first : node.end_lineno])


def _defined(node: ast.stmt) -> set[str]:
    """Names that a statement at the top of a module defines; none for imports and conditions."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return set()
