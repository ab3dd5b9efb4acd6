"""`python -m cluster.store.list STORE`: the artifacts in a store, with their versions, tags, sizes and dates."""

import argparse
from collections.abc import Iterator

from cluster.store.layout import SHORT, version_path
from cluster.store.lookup import names_of, read_tag, read_version, tags_of, versions_of
from cluster.store.storage import Store
from runtime.columns import in_columns
from runtime.errors import UserError, run_command

HEADING = ("name", "version", "tags", "build", "MB", "signed", "pushed")


def rows(store: Store) -> Iterator[tuple[str, ...]]:
    """One row for each version, by name and date."""
    for name in names_of(store):
        tags: dict[str, list[str]] = {}
        for tag in tags_of(store, name):
            tags.setdefault(read_tag(store, name, tag) or "", []).append(tag)
        dated = sorted((store.date(version_path(name, version)), version) for version in versions_of(store, name))
        for date, version in dated:
            record = read_version(store, name, version)
            if record is not None:
                signed = "no" if record.signature is None else "yes"
                size = f"{record.size / 1e6:,.1f}"
                shown = " ".join(tags.get(version, [])) or "-"
                yield name, version[:SHORT], shown, str(record.build_number), size, signed, date


def main() -> int:
    """Print what a store holds; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.store.list", description="List the artifacts in a store.")
    parser.add_argument("store", metavar="STORE", help="a folder, or s3://BUCKET/PREFIX")
    store = Store.open(parser.parse_args().store)
    found = list(rows(store))
    if not found:
        raise UserError(f"the store {store.address} has no artifacts; push one, or check the address")
    print("\n".join(in_columns([HEADING, *found])))
    return 0


if __name__ == "__main__":
    run_command(main)
