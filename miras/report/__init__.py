"""Pages of results: one HTML file that needs nothing but itself."""

from miras.report.comparison import write_report as write_report
from miras.report.page import Page as Page
from miras.report.runs import report as report
