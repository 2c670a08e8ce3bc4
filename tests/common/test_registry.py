"""Names and classes: lazy tables, taken and unknown names, wrong bases."""

import subprocess
import sys

import pytest

from lavish.common.errors import ConfigError
from lavish.common.registry import BASES, BUILT_IN, Registry, load_class, registry


class Base:
    pass


class Good(Base):
    pass


@pytest.fixture
def names() -> Registry:
    return Registry({"task": {"ordered": "collections:OrderedDict"}}, {"task": f"{__name__}:Base"})


@pytest.mark.parametrize("kind", ["model", "processor", "builder", "task", "runner", "lr_scheduler"])
def test_a_class_is_found_under_the_name_that_it_was_registered_with(kind: str) -> None:
    names = Registry()
    assert getattr(names, f"register_{kind}")("mine")(Good) is Good
    assert getattr(names, f"get_{kind}_class")("mine") is Good
    listing = {"builder": "datasets"}.get(kind, f"{kind}s")
    assert getattr(names, f"list_{listing}")() == ["mine"]


def test_a_taken_name_raises_and_says_by_whom(names: Registry) -> None:
    with pytest.raises(ConfigError, match="task name 'ordered' is taken by collections:OrderedDict"):
        names.register_task("ordered")(Good)
    names.register_task("good")(Good)
    with pytest.raises(ConfigError, match=r"'good' is taken by .*Good"):
        names.register_task("good")(Good)


def test_an_unknown_name_suggests(names: Registry) -> None:
    with pytest.raises(
        ConfigError, match=r"No task is named 'orderd'\. Did you mean 'ordered'\? Registered: ordered\."
    ):
        names.get_task_class("orderd")
    with pytest.raises(ConfigError, match="none yet"):
        names.get_model_class("x")


def test_a_class_without_the_base_raises(names: Registry) -> None:
    with pytest.raises(ConfigError, match=r"does not inherit from .*:Base"):
        names.register_task("bad")(dict)
    with pytest.raises(ConfigError, match="Only a class"):
        names.register_task("bad")(lambda: None)
    with pytest.raises(ConfigError, match=r"register_task\('my_name'\)"):
        names.register_task(Good)
    assert names.list_tasks() == ["ordered"]


def test_a_built_in_class_is_imported_on_first_use(names: Registry) -> None:
    import collections

    assert names.get_task_class("ordered") is collections.OrderedDict
    assert names.get_task_class("ordered") is collections.OrderedDict


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, table in BUILT_IN.items() for name in table], ids=lambda value: value
)
def test_every_built_in_name_leads_to_a_class_of_its_base(kind: str, name: str) -> None:
    cls = getattr(registry, f"get_{kind}_class")(name)
    assert isinstance(cls, type)
    assert kind not in BASES or issubclass(cls, load_class(BASES[kind]))


def test_paths_and_objects() -> None:
    names = Registry()
    names.register_path("cache_root", "somewhere")
    assert names.get_path("cache_root") == "somewhere"
    with pytest.raises(ConfigError, match="taken"):
        names.register_path("cache_root", "elsewhere")
    with pytest.raises(ConfigError, match="Did you mean 'cache_root'"):
        names.get_path("cach_root")
    names.register("configuration", 1)
    names.register("configuration", 2)
    assert names.get("configuration") == 2
    assert names.get("nothing", 3) == 3
    assert names.unregister("configuration") == 2
    assert names.get("configuration") is None


def test_registry_and_config_import_neither_torch_nor_omegaconf() -> None:
    code = (
        "import sys; import lavish.common.config, lavish.common.registry; "
        "print(sorted({'torch', 'transformers', 'omegaconf', 'PIL', 'numpy'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
