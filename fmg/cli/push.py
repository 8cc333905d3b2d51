"""`fmg push`: publishes a run or an artifact on the model hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fmg.cli import completion
from fmg.cli.options import AsJson, Offline
from fmg.cli.output import print_json, stderr, stdout, table
from fmg.core.display import counted, size_text
from fmg.core.hub_transfer import MAIN, check_may_push, check_name

if TYPE_CHECKING:
    from fmg.export.push import Parcel


def push(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A run folder, one checkpoint of a run, or an artifact.",
            autocompletion=completion.targets,
        ),
    ],
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub; created if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None,
        typer.Option(metavar="BRANCH", help="Branch to commit to; created if it does not exist.", show_default="main"),
    ] = None,
    message: Annotated[
        str | None,
        typer.Option("--commit-message", metavar="TEXT", help="Commit message.", show_default="the checkpoint"),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="K=V", help="Change a published value of the recipe, e.g. model.student=owner/name."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files that would be sent, with sizes; needs no network.")
    ] = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Publish a run or an artifact on the model hub: its card, weights, recipe and sample images."""
    from fmg.export.push import pack, send_parcel

    branch = revision or MAIN
    check_name(repository, branch)
    if not dry_run:
        check_may_push()
    parcel = pack(target, repository, values=sets or ())
    facts: dict[str, object] = {
        "repository": repository,
        "kind": parcel.kind,
        "files": [{"path": name, "bytes": size} for name, size in parcel.sizes.items()],
        "bytes": sum(parcel.sizes.values()),
        "terms": parcel.terms,
        "notes": list(parcel.notes),
    }
    if dry_run:
        if as_json:
            print_json({**facts, "dry_run": True})
        else:
            _print(parcel)
            stdout().print(f"\nNothing was sent. Without --dry-run, these files go to {repository}.", soft_wrap=True)
        return
    if not as_json:
        _print(parcel)
    pushed = send_parcel(parcel, repository, private, revision, message)
    if as_json:
        made = {"url": pushed.url, "commit": pushed.commit, "created": pushed.created, "changed": pushed.changed}
        print_json({**facts, **made, "deleted": list(pushed.deleted)})
        return
    out = stdout()
    if pushed.deleted:
        out.print(f"Deleted, because this push no longer includes them: {', '.join(pushed.deleted)}", soft_wrap=True)
    done = "Pushed to" if pushed.changed else "Nothing has changed in"
    out.print(f"\n{done} {pushed.url}, commit {pushed.commit}", soft_wrap=True)
    if pushed.changed:
        use = "generate PROMPT --from" if parcel.kind == "run" else "verify --alone"
        place = repository if branch == MAIN else f"{repository}@{branch}"
        out.print(f"Use it: fmg {use} {place}", soft_wrap=True)


def _print(parcel: Parcel) -> None:
    out = stdout()
    out.print(table(["file", "size"], [(name, size_text(size)) for name, size in parcel.sizes.items()], right=["size"]))
    total = size_text(sum(parcel.sizes.values()))
    out.print(f"\n{parcel.label}: {counted(len(parcel.sizes), 'file')}, {total}", soft_wrap=True)
    out.print(f"Terms of the base: {parcel.terms or 'not stated'}", soft_wrap=True)
    for note in parcel.notes:
        stderr().print(f"note: {note}", soft_wrap=True)
