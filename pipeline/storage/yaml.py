"""Plain values from YAML as `yaml.safe_load` reads it, but stricter.

A key given twice is refused (YAML's reader keeps the last), aliases are refused (a few lines of aliases can expand to
gigabytes), `1e-6` is a number as in JSON, and `1:30` is text (YAML 1.1 reads it as ninety).
"""

from pathlib import Path
from typing import Any

from pipeline.errors import UsageError

MAX_BYTES = 1 << 20
_WHOLE = r"[-+]?(?:0|[1-9][0-9]*)"
_NUMBER = (
    r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)


def parse_yaml(text: str, *, where: str) -> Any:
    """Return the plain values of a YAML text.

    Args:
        text: the YAML.
        where: name of the file, for errors.

    Raises:
        UsageError: the text is not YAML, or has other values than plain ones.
    """
    import yaml  # imported here: the command line imports this module, and --help must be fast

    try:
        return yaml.load(text, Loader=_dialect()[0])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not valid YAML: {' '.join(str(error).split())[:200]}") from error


def read_yaml(path: Path) -> Any:
    """Return the plain values of a YAML file; raise UsageError if it is not valid."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot read this file: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path}: a file of settings has at most {MAX_BYTES} bytes, this one has more")
    return parse_yaml(data.decode("utf-8", errors="replace"), where=str(path))


def to_yaml(values: dict[str, Any]) -> bytes:
    """Return plain values as YAML that `parse_yaml` reads back unchanged, one `key: value` per line."""
    import yaml

    return yaml.dump(values, Dumper=_dialect()[1], sort_keys=False, width=10**6).encode()


def to_flow(value: Any) -> str:
    """Return a plain value on one line, such as `[0.4, 1.0]`, that `parse_yaml` reads back unchanged."""
    import yaml

    text = yaml.dump(value, Dumper=_dialect()[1], default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _dialect() -> tuple[Any, Any]:
    """Return the loader, which has our rule for numbers, and the dumper, which quotes text that is a number by ours or YAML 1.1's."""
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                raise yaml.MarkedYAMLError(
                    problem=f"aliases (*{event.anchor}) are not read here", problem_mark=event.start_mark
                )
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} stands there twice", problem_mark=key.start_mark
                    )
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
            return super().construct_mapping(node, deep=deep)

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":int", ":float"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for kind in (Loader, Dumper):
        kind.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{_NUMBER})$"), list("-+.0123456789"))
        kind.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"^(?:{_WHOLE})$"), list("-+0123456789"))
    return Loader, Dumper
