"""Which strategies work on a module, and why the others do not."""

from lightning_bilevel.auditing.audit import Audit, StrategyAudit, audit
from lightning_bilevel.auditing.rehearsal import AuditRow

__all__ = ["Audit", "AuditRow", "StrategyAudit", "audit"]
