"""What to install where a module of an extra is missing."""

__all__ = ["missing"]


def missing(package: str, extra: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return what to raise if the import of a package of flexmsa raised `error`: itself if flexmsa's own part failed.

    >>> missing("flexmsa.testing", "test", ModuleNotFoundError("none", name="hypothesis"))
    ModuleNotFoundError('flexmsa.testing needs hypothesis, which is not installed: pip install flexmsa[test]')
    """
    name = (error.name or "").split(".")[0]
    if name in ("", "flexmsa"):
        return error
    return ModuleNotFoundError(
        f"{package} needs {name}, which is not installed: pip install flexmsa[{extra}]", name=name
    )
