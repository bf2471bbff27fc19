"""A cluster on one machine: `python -m tests.hosts up 3 --gbit 1`, `run -- mpirun -n 6 python -m launch.tp_mlp`, `down`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from tests.hosts.cluster import FRONT, Cluster, environment, of_this_folder, why_not


def main(argv: list[str]) -> int:
    args = options().parse_args(argv)
    if args.do == "up":
        if problem := why_not():
            print(f"skipped: {problem}", file=sys.stderr)
            return 2
        name = args.name or f"c{os.getpid()}"
        if of_this_folder().get(args.name) or (not args.name and of_this_folder()):
            print(f"error: there is a cluster of this folder: {', '.join(of_this_folder())}", file=sys.stderr)
            return 2
        cluster = Cluster.up(args.hosts, args.gbit, name, tied=False)
        rate = f"links of {args.gbit:g} Gbit/s" if args.gbit else "links as fast as they go"
        print(f"cluster {name}: {', '.join(cluster.hosts)}, {rate}; {cluster.shared} is seen by all")
        return 0
    clusters = of_this_folder()
    cluster = clusters.get(args.name) if args.name else next(iter(clusters.values()), None)
    if cluster is None:
        print("error: no such cluster is up: python -m tests.hosts up 3", file=sys.stderr)
        return 2
    return act(args, cluster)


def act(args: argparse.Namespace, cluster: Cluster) -> int:
    if args.do == "down":
        cluster.down()
    elif args.do == "run":
        counts = None if args.counts is None else [int(n) for n in args.counts.split(",")]
        words = args.command[1:] if args.command[:1] == ["--"] else args.command
        command = cluster.on(args.on, words) if args.on else cluster.dealt(words, counts)
        return subprocess.run(command, env=environment(), check=False).returncode
    elif args.do == "link":
        cluster.link(args.host, args.state == "up")
    elif args.do == "kill":
        cluster.kill(args.host)
    elif args.do == "carried":
        for host in cluster.hosts:
            sent, received = cluster.carried(host)
            print(f"{host}: sent {sent:,} bytes, received {received:,}")
    else:
        for host, what in cluster.left().items():
            print(f"{host}: {'; '.join(what) or 'nothing'}")
    return 0


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.hosts", description=__doc__)
    parser.add_argument("--name", help="of the cluster, where this folder has several")
    to_do = parser.add_subparsers(dest="do", required=True)
    up = to_do.add_parser("up", help="make the hosts h1, h2, ... and a front where mpirun runs")
    up.add_argument("hosts", type=int)
    up.add_argument("--gbit", type=float, help="the rate of each host's link, each way")
    run = to_do.add_parser("run", help="a command on the front; of mpirun, with its ranks on the hosts")
    run.add_argument("--counts", help="ranks on each host, as in 2,1,3; else evenly")
    run.add_argument("--on", help=f"the host on which the command itself runs, {FRONT} included; then it is left as it is")
    run.add_argument("command", nargs=argparse.REMAINDER)
    link = to_do.add_parser("link", help="set a host's link up or down")
    link.add_argument("host")
    link.add_argument("state", choices=["up", "down"])
    to_do.add_parser("kill", help="kill a host whole").add_argument("host")
    to_do.add_parser("carried", help="bytes over each host's link so far")
    to_do.add_parser("left", help="what there is in /dev/shm, /tmp and of processes on each host")
    to_do.add_parser("down", help="take it down")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
