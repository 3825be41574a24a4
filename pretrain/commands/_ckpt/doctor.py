"""Say what is unusual in a run's checkpoints, and with --fix put it right; exit code 1 if anything
is left."""

import argparse

HELP = "find, and with --fix mend, what killed or damaged saves left behind"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("output", metavar="RUN", help="the run's output folder")
    parser.add_argument(
        "--fix",
        action="store_true",
        help="delete what is useless and put damaged checkpoints aside; the run must not be going",
    )


def run(args: argparse.Namespace) -> int:
    """Print findings; mend them if asked."""
    from pretrain import ckpt_tools

    findings = ckpt_tools.examine(args.output)
    for finding in findings:
        does = "is" if args.fix else "--fix: would be"
        print(
            f"{finding.folder} {finding.what}" + f"; {does} {finding.remedy}" * bool(finding.remedy)
        )
    if args.fix:
        ckpt_tools.mend(findings)
        findings = ckpt_tools.examine(args.output)
    rows = ckpt_tools.rows(args.output)
    damaged = {finding.folder for finding in findings}
    takes = [row.samples for row in rows if row.folder not in damaged]
    if takes:
        print(f"a resume takes {takes[-1]:,} samples")
    return 1 if findings else 0
