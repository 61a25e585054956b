"""Prove how far plans of the benchmark's sizes are from the optimum: a lower bound by Dantzig-Wolfe decomposition.

    python benchmarks/capacity_bound.py 40x60x1 400x200x1     pools x services x steps; --seconds 300 for each

The linear program counts fractions of replicas, so that its cost is far below any plan in integers. Here the replicas of each
service in each step are integers (a small integer program, solved by HiGHS at prices of GPUs), and only instances and idle
blocks stay fractions. Every round of prices gives a valid lower bound; the prices come from the linear program over the
replicas found so far, smoothed towards the best ones (Pessoa et al. 2018). Prints bound and plan over the linear program, and
each round's bound on standard error. A round of 40x60x24 takes 30 s to 5 minutes; eight of them suffice.
"""

import argparse
import sys
import time
from pathlib import Path

import highspy
import numpy as np
from scipy.sparse import coo_matrix, csr_matrix, hstack, vstack

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from benchmarks.capacity import large  # noqa: E402
from capacity import requirements  # noqa: E402
from capacity.optimize import plan, program, solver  # noqa: E402

OF_A_SERVICE = ("demand", "minimum", "maximum", "zones")
SMOOTH = 0.6  # weight of the best prices so far


def model(cost, lower, upper, matrix, row_lower, row_upper, integer=None):
    """Return a HiGHS model of sparse rows."""
    made = highspy.Highs()
    made.setOptionValue("output_flag", False)
    made.setOptionValue("threads", 1)
    made.setOptionValue("mip_rel_gap", 1e-3)  # its dual bound counts, which is valid at any gap
    rows = csr_matrix(matrix)
    kinds = np.zeros(len(cost), dtype=np.int32) if integer is None else integer.astype(np.int32)
    made.passModel(
        len(cost), rows.shape[0], rows.nnz, int(highspy.MatrixFormat.kRowwise), int(highspy.ObjSense.kMinimize), 0.0,
        cost, lower, upper, row_lower, row_upper, rows.indptr[:-1].astype(np.int32), rows.indices.astype(np.int32), rows.data, kinds,
    )  # fmt: skip
    return made


class Part:
    """The integer program of one service in one step."""

    def __init__(self, built, matrix, columns, rows):
        self.columns = columns
        self.integer = built.integer[columns]
        self.model = model(
            np.zeros(len(columns)), built.lower[columns], built.upper[columns], matrix[rows][:, columns],
            built.row_lower[rows], built.row_upper[rows], self.integer,
        )  # fmt: skip
        self.found = []

    def solve(self, price):
        """Keep the cheapest replicas at these prices; return a lower bound of their cost."""
        self.model.changeColsCost(len(self.columns), np.arange(len(self.columns), dtype=np.int32), price[self.columns])
        self.model.run()
        values = np.array(self.model.getSolution().col_value)
        self.found.append(np.where(self.integer, np.round(values), values))
        return self.model.getInfo().mip_dual_bound


def bound(built, relaxed, start, seconds):
    """Return the best lower bound found in the time given, and the rounds of prices."""
    began = time.perf_counter()
    matrix = coo_matrix((built.val, (built.row, built.col)), shape=(len(built.row_lower), len(built.cost))).tocsr()
    owner = np.full(built.columns, -1)
    owner[built.at.x : built.at.b] = built.pairs[:, 1]
    owner[built.at.h : built.at.y] = built.spare
    owner[built.at.y : built.columns] = built.spread
    names = {}
    row_owner = np.array(
        [names.setdefault(n.key, len(names)) if n.sort in OF_A_SERVICE else -1 for n in built.row_names]
    )
    parts = []
    for t in range(built.steps):
        for j in range(len(names)):
            columns = np.flatnonzero(owner == j) + t * built.columns
            parts.append(Part(built, matrix, columns, np.flatnonzero(row_owner == j) + t * built.rows))
            parts[-1].found.append(start[columns])
    own = np.flatnonzero(np.tile(owner < 0, built.steps))
    shared = np.flatnonzero(np.tile(row_owner < 0, built.steps))
    rows, low, high = matrix[shared], built.row_lower[shared], built.row_upper[shared]
    # The first prices: those of the pools themselves, as if starts cost nothing, which is near the best over many steps.
    pools = built.at.u
    gpus = np.bincount(built.row[: len(built.val)], np.where(built.col % built.columns < pools, built.val, 0.0))[:pools]
    dual = np.zeros(built.steps * built.rows).reshape(built.steps, -1)
    dual[:, :pools] = built.cost[:pools] / gpus
    dual = dual.ravel()[shared]
    best, best_dual, rounds = -np.inf, dual, 0
    while time.perf_counter() - began < seconds:
        rounds += 1
        price = built.cost - rows.T @ dual
        total = sum(part.solve(price) for part in parts)
        reach = np.where(np.isfinite(built.upper[own]), built.upper[own], 1e5)  # no plan of these sizes holds more
        total += np.where(price[own] < 0, price[own] * reach, price[own] * built.lower[own]).sum()
        side = np.where(dual > 0, low, high)
        total += (np.where(dual != 0, side, 0.0) * dual).sum()
        print(
            f"  round {rounds}, {time.perf_counter() - began:.0f} s: {total / relaxed.objective - 1:.2%} over the linear program",
            file=sys.stderr,
        )
        if total > best:
            best, best_dual = total, dual
        if rounds == 1:
            dual = relaxed.row_dual[shared]
            continue
        tables = [np.unique(np.array(part.found), axis=0).T for part in parts]
        blocks = [rows[:, own], *(csr_matrix(rows[:, p.columns] @ x) for p, x in zip(parts, tables, strict=True))]
        costs = [built.cost[own], *(built.cost[p.columns] @ x for p, x in zip(parts, tables, strict=True))]
        counts = [x.shape[1] for x in tables]
        one = np.repeat(np.arange(len(parts)), counts)
        choose = csr_matrix(
            (np.ones(len(one)), (one, np.arange(len(one)) + len(own))), (len(parts), len(one) + len(own))
        )
        upper = np.concatenate([built.upper[own], np.full(len(one), np.inf)])
        lower = np.concatenate([built.lower[own], np.zeros(len(one))])
        ones = np.ones(len(parts))
        master = model(
            np.concatenate(costs), lower, upper, vstack([hstack(blocks), choose]),
            np.concatenate([low, ones]), np.concatenate([high, ones]),
        )  # fmt: skip
        master.run()
        solution = master.getSolution()
        if master.getInfo().objective_function_value <= best * 1.001:
            break
        dual = SMOOTH * best_dual + (1 - SMOOTH) * np.array(solution.row_dual)[: len(shared)]
    return best, rounds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="+", metavar="PxSxT")
    parser.add_argument("--seconds", type=float, default=300.0)
    options = parser.parse_args()
    for size in options.sizes:
        problem = large(*map(int, size.split("x")))
        built = program.build(problem, requirements.compute(problem, "restored"))
        relaxed = solver.relax(built)
        found = plan.solve(problem)
        values = solver.integers(built, relaxed, problem, found.need).values
        best, rounds = bound(built, relaxed, values, options.seconds)
        least = max(1.0, best / relaxed.objective)
        print(
            f"{size}: over the linear program: bound {least - 1:.2%}, plan {found.cost / found.relaxed_cost - 1:.2%}; "
            f"plan over the bound {found.cost / found.relaxed_cost / least - 1:.2%} ({rounds} rounds)",
            flush=True,
        )


if __name__ == "__main__":
    main()
