"""The pages as a FastAPI application over one catalog. Read-only, and works offline."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from discovery.records import VERDICTS, Effect
from labeling.catalog import SORTS, Catalog
from labeling.summary import CONTROLS, HELD_OUT, T_TOPICS, is_crossfit, topics_of
from labeling.web import charts, sentences
from labeling.words import method_name, number, probability

HERE = Path(__file__).parent
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
PAGE_POLICY = "default-src 'self'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
REPORT_POLICY = (  # one self-contained page with its own styles and pictures, and no script
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; "
    "base-uri 'none'; frame-ancestors 'none'"
)


def _slug(words: str) -> str:
    return words.replace(" ", "-")


def _environment(**shared: Any) -> Environment:
    """Templates with their filters, and `shared` as names that every one of them knows."""
    environment = Environment(
        loader=PackageLoader("labeling.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {  # pyright: ignore[reportUnknownMemberType]
        "number": number,
        "probability": probability,
        "method": method_name,
        "site": sentences.site_words,
        "slugged": _slug,
    }
    environment.globals |= shared | {  # pyright: ignore[reportUnknownMemberType]
        "AUROC": charts.AUROC,
        "VERDICTS": VERDICTS,
        "CONTROLS": CONTROLS,
        "Scale": charts.Scale,
        "heat": charts.heat,
    }
    return environment


def create_app(
    catalog: Path, report: Path | None = None, *, hosts: Sequence[str] = LOOPBACK
) -> FastAPI:
    """The application.

    Args:
        catalog: the catalog's file.
        report: the run's HTML report, if there is one.
        hosts: names by which a browser may address the server; others are refused, so that a page
            elsewhere cannot reach it through a name of its own (DNS rebinding).

    Raises:
        UserError: the catalog cannot be read.
    """
    store = Catalog(catalog)
    facts = store.facts()
    sets = store.text_sets()
    topics, held_out = topics_of(sets), HELD_OUT[is_crossfit(sets)]
    environment = _environment(
        model=facts.get("model", ""),
        known={row.concept.name: row.concept for row in store.concepts()},
        has_report=report is not None and report.is_file(),
        one_topic=topics == 1,
        crossfit=is_crossfit(sets),
        held_out=held_out,
        over="over topics" if topics is None or topics >= T_TOPICS else "by DeLong",
    )
    app = FastAPI(title="Emotion Atlas", docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)

    def page(template: str, status: int = 200, /, **values: Any) -> HTMLResponse:
        return HTMLResponse(environment.get_template(template).render(values), status)

    @app.middleware("http")
    async def secure(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        response = await call_next(request)
        response.headers.setdefault("Content-Security-Policy", PAGE_POLICY)
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    @app.exception_handler(HTTPException)
    @app.exception_handler(RequestValidationError)
    async def missing(request: Request, error: Exception) -> HTMLResponse:
        status = error.status_code if isinstance(error, HTTPException) else 404
        return page("missing.html", status, address=request.url.path, status=status)

    # The handlers are coroutines so that all reading of the catalog happens in one thread.
    @app.get("/")
    async def concepts(
        verdict: str = "",
        family: str = "",
        q: str = "",
        sort: str = "verdict",
        reverse: bool = False,
    ) -> HTMLResponse:
        sort = sort if sort in SORTS else "verdict"
        return page(
            "concepts.html",
            rows=store.concepts(verdict, family, q, sort, reverse),
            counts=store.verdict_counts(),
            families=store.families(),
            control=sentences.control_sentence(store.controls(), topics),
            facts=facts,
            sets=sets,
            verdict=verdict,
            family=family,
            q=q,
            sort=sort,
            reverse=reverse,
        )

    @app.get("/concept/{slug}")
    async def concept(slug: str) -> HTMLResponse:
        found = store.concept(slug)
        if found is None:
            raise HTTPException(404)
        return page(
            "concept.html",
            c=found,
            sentence=sentences.verdict_sentence(
                found.row.alignment, len(found.members) or None, held_out
            ),
            methods=charts.method_rows(found.scores, crossfit=is_crossfit(sets)),
            figures=sentences.figure_rows(found.row.alignment, topics, held_out),
            comparisons=[
                (c, charts.cosine_scale(c), sentences.comparison_sentence(c, held_out))
                for c in found.comparisons
            ],
            plot=charts.dose_plot(found.effects),
        )

    @app.get("/feature/{site}/{latent}")
    async def feature(site: str, latent: int) -> HTMLResponse:
        found = store.feature(site, latent)
        if found is None:
            raise HTTPException(404)
        by_concept: dict[str, list[Effect]] = {}
        for effect in found.effects:
            by_concept.setdefault(effect.concept, []).append(effect)
        return page(
            "feature.html",
            f=found,
            peak=max((c.peak for c in found.contexts), default=0.0),
            strongest=max((abs(p.logit) for p in (*found.raised, *found.lowered)), default=1.0),
            plots=[(name, charts.dose_plot(rows), rows) for name, rows in by_concept.items()],
        )

    @app.get("/search")
    async def search(q: str = "") -> Response:
        hits = store.search(q)
        exact = [h for h in hits if h.kind == "concept" and h.title == q.strip().lower()]
        if exact:
            return RedirectResponse(f"/concept/{exact[0].key}", 303)
        return page("search.html", q=q, hits=hits)

    @app.get("/report")
    async def show_report() -> Response:
        if report is None or not report.is_file():
            raise HTTPException(404)
        policy = {"Content-Security-Policy": REPORT_POLICY}
        return FileResponse(report, media_type="text/html", headers=policy)

    return app
