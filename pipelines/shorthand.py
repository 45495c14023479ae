"""A recipe's shorthand written out: overrides, one stage per domain, and the patterns that refer to them.

It works on plain data, before there are types, so that every key keeps the place where it was written.
"""

import copy
from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from .recipe_errors import suggest
from .yaml_lines import Document, dotted, parse_override

DOMAIN = "{domain}"


def apply(document: Document, overrides: Sequence[str]) -> None:
    """Set the overrides ("a.b=VALUE") and write the recipe's shorthand out, in place.

    What has the wrong type is left as it is, for the typed tree to refuse. Raises UserError.
    """
    of_stages = []
    for override in overrides:
        keys, value = parse_override(override)
        written = dotted(keys)
        if keys[:1] == ("stages",) and len(keys) > 1:
            of_stages.append((keys, value, written))
            continue
        if keys[:1] == ("domains",) and len(keys) > 1:
            _known(keys[1], document.data.get("domains"), "domain", written)
        document.set(keys, written, value)
    domains, stages = document.data.get("domains"), document.data.get("stages")
    if not (domains and isinstance(domains, dict) and isinstance(stages, dict)):
        return
    made, domain_of = _split(document, list(domains))
    for (_, stage, *rest), value, written in of_stages:
        _known(stage, made | document.data["stages"], "stage", written)
        for name in made.get(str(stage), [str(stage)]):
            document.set(("stages", name, *rest), written, copy.deepcopy(value))
    for name, stage in document.data["stages"].items():
        if isinstance(stage, dict):
            if name in domain_of and "domains" in stage:
                problem = "the stage's name gives its domain; leave this key out"
                raise UserError(document.error(("stages", name, "domains"), problem))
            _write_out(stage, domain_of.get(name), list(domains))


def _known(name: str | int, choices: Any, what: str, written: str) -> None:
    if isinstance(choices, dict) and name not in choices:
        raise UserError(f"--set {written}: no {what} '{name}'; {suggest(str(name), choices)}")


def _split(document: Document, domains: list[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """One stage per domain for each name with {domain}, in place.

    Returns the names made from each name as written, and the domain of each name that has one.
    """
    written, stages, domain_of = document.data["stages"], {}, {}
    made = {name: [name] for name in written}
    for template in written:
        if DOMAIN in template:
            made[template] = [template.replace(DOMAIN, domain) for domain in domains]
            domain_of |= zip(made[template], domains, strict=True)
    for template, names in made.items():
        for name in names:
            if name in stages:
                raise UserError(document.error(("stages", template), f"makes a second '{name}'; rename one"))
            stages[name] = copy.deepcopy(written[template])
    for template, names in made.items():
        for name in names:
            document.copy_origins(("stages", template), ("stages", name))
    document.data["stages"] = stages
    return made, domain_of


def _write_out(stage: dict[str, Any], domain: str | None, domains: list[str]) -> None:
    """Replace a stage's shorthand in place: absent domains, an optimizer's name alone, patterns in from, of, teachers.

    domain: the one in the stage's name.
    """
    if domain is not None:
        domains = [domain]
    if stage.get("kind") in ("sft", "grpo", "distill"):
        given = stage.setdefault("domains", domains)
        if isinstance(given, list) and all(isinstance(name, str) for name in given):
            domains = given
    if isinstance(optimizer := stage.get("optimizer"), str):
        stage["optimizer"] = {"name": optimizer}
    if domain is not None and isinstance(stage.get("from"), str):
        stage["from"] = stage["from"].replace(DOMAIN, domain)
    if isinstance(of := stage.get("of"), str | list):
        patterns = [of] if isinstance(of, str) else of
        stage["of"] = [name for pattern in patterns for name in _each(pattern, domains)]
    if isinstance(teachers := stage.get("teachers"), str):
        stage["teachers"] = {name: teachers.replace(DOMAIN, name) for name in domains}
    elif isinstance(teachers, dict):
        stage["teachers"] = {name: _each(item, [name])[0] for name, item in teachers.items()}


def _each(reference: Any, domains: list[str]) -> list[Any]:
    """A pattern for each domain; anything else as it is."""
    if isinstance(reference, str) and DOMAIN in reference:
        return [reference.replace(DOMAIN, domain) for domain in domains]
    return [reference]
