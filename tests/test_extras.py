import pytest

from mdnorm.extras import MissingExtraError, requires


def test_a_missing_package_names_the_extra():
    message = r"'no_such_package' is missing: pip install 'mdnorm\[audit\]'"
    with pytest.raises(MissingExtraError, match=message), requires("audit"):
        import no_such_package.part  # noqa: F401


def test_a_missing_module_of_our_own_is_a_defect_not_an_extra():
    with pytest.raises(ModuleNotFoundError), requires("audit"):
        import mdnorm.no_such_module  # noqa: F401


def test_packages_that_are_there_pass():
    with requires("audit"):
        import json  # noqa: F401
