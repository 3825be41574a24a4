"""`plan`: what a run would hold, compute, send, take and cost on a cluster that is not there."""

import argparse

from pretrain.commands._options import add_overrides, count

HELP = "predict memory, time and price of a run on a cluster of GPUs, from its configuration alone"


def configure(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--config", required=True, help="YAML file, such as configs/sd15-512.yaml")
    add_overrides(parser)
    parser.add_argument("--nodes", type=count, required=True, help="of the cluster")
    parser.add_argument("--gpus-per-node", type=count, default=8, help="(default: 8)")
    parser.add_argument("--gpu", required=True, help="a100, a100-40, h100 or h200")
    parser.add_argument(
        "--samples", type=count, help="to see; 1e9 is understood (default: training.samples)"
    )
    parser.add_argument("--price", type=float, help="dollars of one GPU's hour")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from pretrain import config, forecast, forecast_text, hardware, plan
    from pretrain.run_config import RunConfig

    gpu = hardware.accelerator(args.gpu)
    settings = config.load(RunConfig, args.config, args.overrides)
    work = forecast.Workload(settings, plan.vocab_size(settings))
    found = forecast.forecast(work, gpu, args.nodes, args.gpus_per_node)
    samples = args.samples or settings.training.samples
    print(forecast_text.render(work, found, gpu, args.nodes, samples, args.price))
    return 0
