"""Who may import whom, what the pure rooms may not touch, and how long files and functions may be."""

import ast

from tests.source_tree import FILES, circles, functions, imports, modules, name, room, tree

# From low to high: a room may import rooms of its own layer and of layers before it.
LAYERS = (
    ("shared", "configs", "errors", "paths", "sampling_params", "conversations", "answer_stats"),
    ("runtime",),
    ("settings",),
    ("native",),
    ("messaging",),
    ("store",),
    ("models",),
    ("engine",),
    ("adapters",),
    ("retention",),
    ("prompts",),
    ("learning",),
    ("loading", "training_files"),
    ("in_process", "status"),
    ("specl",),
    ("bench",),
    ("daemons",),
    ("daemons.inference", "daemons.collector", "daemons.trainer", "daemons.gateway", "cli"),
)
RANK = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}
ROOMS_OF_LIBRARY = {
    "zmq": {"messaging"},
    "msgpack": {"messaging"},
    "sqlalchemy": {"store"},
    "pydantic": {"settings", "adapters", "daemons.inference"},
    "click": {"cli"},
    "starlette": {"daemons.gateway"},
    "uvicorn": {"daemons.gateway"},
    "pickle": set(),
}
PURE = ("engine", "learning")  # what they need is handed in
DISK = {
    "environ",
    "getenv",
    "write_text",
    "write_bytes",
    "read_text",
    "read_bytes",
    "mkdir",
    "unlink",
    "rename",
    "rmtree",
    "glob",
}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
REASON = "Long because"


def refuse(violations):
    """Fail with these lines, one a violation."""
    assert not violations, "\n" + "\n".join(sorted(violations))


def ours():
    return [arrow for arrow in imports() if arrow.module in modules()]


def between_rooms():
    return [(arrow, room(arrow.importer), room(arrow.module)) for arrow in ours()]


def graph(arrows):
    result = {}
    for source, target in arrows:
        if source != target:
            result.setdefault(source, set()).add(target)
    return result


def rooms_of(module, otherwise):
    """Where a library may be imported; `otherwise` for those without a rule."""
    return ROOMS_OF_LIBRARY.get(module.split(".")[0], {otherwise})


def impurity(node):
    """What a pure room may not use, or nothing."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
        return "open()"
    if isinstance(node, ast.Attribute) and node.attr in DISK:
        return f".{node.attr}"
    return ""


def lines(arrows):
    """The line that shows each of these imports, with what is wrong with it."""
    return [f"{arrow} {why}" for arrow, why in arrows]


def not_allowed(arrow):
    return f"(room {room(arrow.importer)} may not import room {room(arrow.module)})"


def test_every_room_has_a_layer():
    assert {room(module) for module in modules()} <= set(RANK)


def test_no_room_imports_a_higher_room():
    upward = (arrow for arrow, source, target in between_rooms() if RANK[target] > RANK[source])
    refuse(lines((arrow, not_allowed(arrow)) for arrow in upward))


def test_no_circle_between_rooms():
    # an arrow never runs up, so that a circle could only lie within one layer
    level = [(source, target) for _, source, target in between_rooms() if RANK[source] == RANK[target]]
    assert not circles(graph(level))


def test_no_circle_between_modules():
    # imports under TYPE_CHECKING are left out: they never run, and two types may name each other
    arrows = [arrow for arrow in ours() if not arrow.for_types]
    parts = circles(graph((arrow.importer, arrow.module) for arrow in arrows))
    within = (arrow for arrow in arrows if any({arrow.importer, arrow.module} <= set(part) for part in parts))
    refuse(lines((arrow, "(in a circle)") for arrow in within))


def test_daemons_import_neither_each_other_nor_cli():
    tops = ("daemons", "cli")
    sideways = (
        arrow
        for arrow, source, target in between_rooms()
        if source != target and source.startswith(tops) and target.startswith(tops) and target != "daemons"
    )
    refuse(lines((arrow, not_allowed(arrow)) for arrow in sideways))


def test_libraries_stay_in_their_rooms():
    strays = (arrow for arrow in imports() if room(arrow.importer) not in rooms_of(arrow.module, room(arrow.importer)))
    refuse(lines((arrow, f"(room {room(arrow.importer)} may not)") for arrow in strays))


def test_pure_rooms_touch_no_disk_and_no_environment():
    uses = [
        f"{name(path)}:{node.lineno} uses {used}"
        for module, path in modules().items()
        if room(module) in PURE
        for node in ast.walk(tree(path))
        if (used := impurity(node))
    ]
    refuse(uses)


def test_pure_rooms_know_no_settings():
    arrows = (arrow for arrow, source, target in between_rooms() if source in PURE and target == "settings")
    refuse(lines((arrow, not_allowed(arrow)) for arrow in arrows))


def test_every_module_says_what_it_is():
    assert not [name(path) for path in FILES if not ast.get_docstring(tree(path))]


def test_long_files_give_their_reason():
    lengths = {path: path.read_text(encoding="utf-8").count("\n") for path in FILES}
    long = [
        f"{name(path)} has {length} lines and no '{REASON} ...' in its docstring"
        for path, length in lengths.items()
        if length > LONGEST_FILE and REASON not in (ast.get_docstring(tree(path)) or "")
    ]
    refuse(long)


def test_functions_can_be_seen_whole():
    long = [
        f"{name(path)}:{node.lineno} {node.name} is longer than {LONGEST_FUNCTION} lines"
        for path in FILES
        for node in functions(path)
        if node.end_lineno - node.lineno >= LONGEST_FUNCTION
    ]
    refuse(long)
