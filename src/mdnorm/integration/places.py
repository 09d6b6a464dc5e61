"""Which modules of a model are meant by a name, a pattern or a class, and which of them can have a layer."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mdnorm.context import check_module
from mdnorm.integration.design import AttachedDesign
from mdnorm.layer import MetadataNorm

LAYER_NAME = "metadata_norm"
"""Of the child that `mdnorm.insert` gives a module."""

Target = str | type[nn.Module] | nn.Module


def named(model: nn.Module) -> dict[int, tuple[nn.Module, list[str]]]:
    """Return modules with all their names, in the order of the model; what mdnorm put there is left out."""
    names: dict[int, tuple[nn.Module, list[str]]] = {}
    hidden: set[int] = set()
    for module in model.modules():
        if isinstance(module, (MetadataNorm, AttachedDesign)):
            hidden |= {id(part) for part in module.modules()}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) not in hidden:
            names.setdefault(id(module), (module, []))[1].append(name)
    return names


def targets(model: nn.Module, after: Any) -> dict[str, nn.Module]:
    """Return the modules that are meant, by their first names, in the order of the model."""
    names = named(model)
    wanted: set[int] = set()
    parts = list(after) if isinstance(after, (list, tuple, set, frozenset)) else [after]
    if not parts:
        raise ValueError("after is empty: give the name, pattern or type of at least one module.")
    for part in parts:
        wanted |= _matching(model, names, part)
    return {all_names[0]: module for key, (module, all_names) in names.items() if key in wanted}


def _matching(model: nn.Module, names: dict[int, tuple[nn.Module, list[str]]], part: Any) -> set[int]:
    if isinstance(part, nn.Module):
        if id(part) not in names:
            raise ValueError(
                f"after has a {type(part).__name__} that is not part of the {type(model).__name__}"
                + (": it is a MetadataNorm of its own." if isinstance(part, MetadataNorm) else ".")
            )
        return {id(part)}
    if isinstance(part, type) and issubclass(part, nn.Module):
        found = {
            key for key, (module, _) in names.items() if isinstance(module, part) and module is not model
        }
        if not found:
            types = sorted({type(module).__name__ for module, _ in names.values() if module is not model})
            raise ValueError(
                f"{type(model).__name__} has no module of type {part.__name__}: its types are "
                f"{', '.join(types) or 'none'}."
            )
        return _without_lenders(model, found, f"the class {part.__name__}")
    if not isinstance(part, str):
        raise TypeError(
            f"after must be the name of a module, a pattern, a class, a module or several, got {part!r}."
        )
    exact = {key for key, (_, all_names) in names.items() if part in all_names}
    if exact:
        return exact
    if "*" in part or "?" in part:
        pattern = _compiled(part)
        found = {
            key for key, (_, all_names) in names.items() if any(n and pattern.fullmatch(n) for n in all_names)
        }
        if found:
            return _without_lenders(model, found, f"the pattern {part!r}")
    known = (name for _, all_names in names.values() for name in all_names)
    raise ValueError(f"{type(model).__name__} has no module {part!r}: {near_names(part, known)}.")


def _compiled(pattern: str) -> re.Pattern[str]:
    """``*`` and ``?`` stay within a part of a name, ``**`` stands for any number of parts."""
    text = re.escape(pattern).replace(r"\*\*\.", "(?:.+[.])?").replace(r"\.\*\*", "(?:[.].+)?")
    return re.compile(text.replace(r"\*\*", ".*").replace(r"\*", "[^.]*").replace(r"\?", "[^.]"))


def near_names(part: str, names: Iterable[str]) -> str:
    """Return for an error message which of the names are near to one that is not there."""
    known = [name for name in names if name]
    if not known:
        return "it has no modules inside"
    near = difflib.get_close_matches(part, known, n=5, cutoff=0.5)
    ending = [
        name for name in known if name.rpartition(".")[2] == part.rpartition(".")[2] and name not in near
    ]
    near += ending[: 5 - len(near)]
    last = f"the last of its {len(known)} modules are {', '.join(map(repr, known[-3:]))}"
    if near:
        return f"did you mean {', '.join(map(repr, near))}? {last[0].upper()}{last[1:]}"
    if len(known) <= 30:
        return f"its modules are {', '.join(known)}"
    return f"its modules are {', '.join(known[:30])}, …; {last}"


def lenders(model: nn.Module) -> dict[int, str]:
    """Return the modules whose weights alone are used, with the name of the one that calls them by it."""
    return {
        id(module.out_proj): name
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }


def _without_lenders(model: nn.Module, found: set[int], what: str) -> set[int]:
    """Leave out what a pattern or a class matches by the way; what is named itself is an error later."""
    rest = found - lenders(model).keys()
    if not rest:
        raise ValueError(
            f"{what} matches only modules whose weights are used by an nn.MultiheadAttention, which never "
            f"calls them: insert after {', '.join(map(repr, sorted(lenders(model).values())[:5]))}."
        )
    return rest


def calls_its_children(module: nn.Module) -> bool:
    """Whether this is an `nn.Sequential` that does what one does."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def refuse_wrapped(model: nn.Module) -> None:
    """Raise where the model is none, or compiled or wrapped: something holds on to it as it was."""
    check_module(model)
    if _is_wrapped(model):
        raise ValueError(
            f"the model is compiled or wrapped ({type(model).__name__}): insert into the plain model first."
        )


def _is_wrapped(module: nn.Module) -> bool:
    """Whether something holds on to the module as it was: a graph that has run is not traced again."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)
    is_compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    return is_compiled or isinstance(module, wrappers)


def refuse_wrapped_parts(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Raise ValueError where one of the modules is inside of a compiled or wrapped one."""
    for around in filter(_is_wrapped, model.modules()):
        inside = set(around.modules())
        for name, module in modules.items():
            if module in inside:
                raise ValueError(
                    f"{name!r} is, or is inside, a compiled or wrapped module ({type(around).__name__}), "
                    "which would not see what is inserted now: insert first, then compile or wrap."
                )


def refuse_unusable(model: nn.Module, name: str, module: nn.Module, takes_apart: bool) -> None:
    """Raise ValueError where a module has no output, or not one that a layer can have.

    `takes_apart` says whether the output is to be taken apart or turned (`output`, `sample_dim`).
    """
    if isinstance(getattr(module, LAYER_NAME, None), MetadataNorm):
        raise ValueError(f"{name!r} has a MetadataNorm behind it already: mdnorm.remove it first.")
    if hasattr(module, LAYER_NAME):
        raise ValueError(f"{name!r} has something else of the name {LAYER_NAME!r}: rename it.")
    caller = lenders(model).get(id(module))
    if caller is not None:
        raise ValueError(
            f"{name!r} lends its weights to an nn.MultiheadAttention, which never calls it. Insert after "
            f"{caller!r}."
        )
    containers = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    if isinstance(module, containers):
        raise ValueError(
            f"{name!r} is an {type(module).__name__}, which has no output: insert after '{name}.*', say."
        )
    if not isinstance(module, nn.Sequential):
        return
    inside = [key for key, child in module.named_children() if not isinstance(child, AttachedDesign)]
    last = ".".join(part for part in (name, *inside[-1:]) if part)
    if not calls_its_children(module):
        raise ValueError(
            f"{name!r} is an nn.Sequential with a forward of its own ({type(module).__name__}), which may "
            f"call all its modules: insert after one of them, {last!r} say."
        )
    if takes_apart:
        raise ValueError(f"{name!r} is an nn.Sequential: with output= or sample_dim= insert after {last!r}.")
