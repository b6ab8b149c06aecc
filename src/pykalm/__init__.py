"""kalm aligns an autoregressive language model with a knowledge graph, measures it, and asks it.

Nothing is loaded at import: each name below is fetched from its module when it is first used, so that the
command line can print its help without loading PyTorch. No other place of the package imports lazily.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pykalm.ablate import run_ablation
    from pykalm.api import (
        UnsavedReport,
        check_data,
        evaluate_links,
        fetch_data,
        list_data,
        load_graph,
        load_run,
        predict,
        train,
    )
    from pykalm.api_checks import has_ended, require_names, require_split
    from pykalm.api_compare import compare_runs, evaluate_rerank
    from pykalm.api_geometry import evaluate_geometry
    from pykalm.api_language import evaluate_language
    from pykalm.api_qa import evaluate_qa, rank_answers
    from pykalm.api_report import write_report
    from pykalm.bench.bench import run_bench
    from pykalm.bench.table import bench_table
    from pykalm.config import Config, load_config
    from pykalm.demo import run_demo
    from pykalm.errors import KalmError
    from pykalm.processes import may_report_failure
    from pykalm.report.compare_tables import ablation_table, comparison_table, rerank_table
    from pykalm.report.measure_tables import geometry_table, language_table
    from pykalm.report.qa_table import qa_table
    from pykalm.report.tables import (
        catalogue_table,
        graph_check_table,
        link_prediction_table,
        prediction_table,
        relation_table,
    )

__version__ = "0.1.0"

__all__ = [
    "Config",
    "KalmError",
    "UnsavedReport",
    "__version__",
    "ablation_table",
    "bench_table",
    "catalogue_table",
    "check_data",
    "compare_runs",
    "comparison_table",
    "evaluate_geometry",
    "evaluate_language",
    "evaluate_links",
    "evaluate_qa",
    "evaluate_rerank",
    "fetch_data",
    "geometry_table",
    "graph_check_table",
    "has_ended",
    "language_table",
    "link_prediction_table",
    "list_data",
    "load_config",
    "load_graph",
    "load_run",
    "may_report_failure",
    "predict",
    "prediction_table",
    "qa_table",
    "rank_answers",
    "relation_table",
    "require_names",
    "require_split",
    "rerank_table",
    "run_ablation",
    "run_bench",
    "run_demo",
    "train",
    "write_report",
]

# Names from elsewhere than pykalm.api.
HOMES = {
    "Config": "pykalm.config",
    "KalmError": "pykalm.errors",
    "ablation_table": "pykalm.report.compare_tables",
    "bench_table": "pykalm.bench.table",
    "catalogue_table": "pykalm.report.tables",
    "compare_runs": "pykalm.api_compare",
    "comparison_table": "pykalm.report.compare_tables",
    "evaluate_rerank": "pykalm.api_compare",
    "evaluate_qa": "pykalm.api_qa",
    "evaluate_geometry": "pykalm.api_geometry",
    "evaluate_language": "pykalm.api_language",
    "geometry_table": "pykalm.report.measure_tables",
    "graph_check_table": "pykalm.report.tables",
    "has_ended": "pykalm.api_checks",
    "language_table": "pykalm.report.measure_tables",
    "link_prediction_table": "pykalm.report.tables",
    "load_config": "pykalm.config",
    "may_report_failure": "pykalm.processes",
    "prediction_table": "pykalm.report.tables",
    "qa_table": "pykalm.report.qa_table",
    "rank_answers": "pykalm.api_qa",
    "relation_table": "pykalm.report.tables",
    "require_names": "pykalm.api_checks",
    "require_split": "pykalm.api_checks",
    "rerank_table": "pykalm.report.compare_tables",
    "run_ablation": "pykalm.ablate",
    "run_bench": "pykalm.bench.bench",
    "run_demo": "pykalm.demo",
    "write_report": "pykalm.api_report",
}


def __getattr__(name: str) -> Any:
    """Fetch a public name from its module (PEP 562); raises AttributeError for any other name."""
    if name not in __all__:
        raise AttributeError(f"module 'pykalm' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(HOMES.get(name, "pykalm.api")), name)


def __dir__() -> list[str]:
    """List the public names, fetched or not."""
    return sorted({*globals(), *__all__})
