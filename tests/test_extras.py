import pytest

from mdnorm.extras import MissingExtraError, requires


def test_a_missing_package_names_the_extra():
    message = r"'no_such_package' is missing: pip install 'mdnorm\[audit\]'"
    with pytest.raises(MissingExtraError, match=message), requires("audit"):
        import no_such_package.part  # noqa: F401


def test_a_missing_module_of_our_own_is_a_defect_not_an_extra():
    with pytest.raises(ModuleNotFoundError), requires("audit"):
        import mdnorm.no_such_module  # noqa: F401


def test_an_extra_may_be_that_of_a_package_which_builds_on_this_one():
    message = r"pip install 'other-package\[video\]'"
    with pytest.raises(MissingExtraError, match=message), requires("video", "other-package"):
        import no_such_package  # noqa: F401
    with pytest.raises(ModuleNotFoundError) as raised, requires("video", "other-package"):
        import other_package  # noqa: F401
    assert not isinstance(raised.value, MissingExtraError)


def test_packages_that_are_there_pass():
    with requires("audit"):
        import json  # noqa: F401
