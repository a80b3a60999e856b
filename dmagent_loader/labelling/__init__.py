"""Topics of text: what data are about, for domains without labels.

`linear`, `deberta` and `web_organizer` are classifiers behind one interface (`classifier`); `taxonomy` reads the labels
that data already carry and maps other taxonomies to the 26 topics. `labels` combines the two. On top of it, `files`
labels whole domains, `compose` measures a domain on a sample, and `start_state` the base model's own data. `filtering`
finds documents that should not be trained on.
"""

from dmagent_loader.labelling.classifier import Classifier, load_classifier
from dmagent_loader.labelling.compose import SampleConfig, compose
from dmagent_loader.labelling.documents import FileDocuments, ShardDocuments
from dmagent_loader.labelling.files import label_domains
from dmagent_loader.labelling.filter_files import filter_domains
from dmagent_loader.labelling.filtering import DocumentFilter, FilterConfig
from dmagent_loader.labelling.generated_files import generate_documents
from dmagent_loader.labelling.generation import GenerationConfig, generate_texts
from dmagent_loader.labelling.labels import LabelConfig, Labeller, Labels
from dmagent_loader.labelling.linear import LinearClassifier
from dmagent_loader.labelling.start_state import start_state_of_documents, start_state_of_model
from dmagent_loader.labelling.taxonomy import WEB_ORGANIZER, stated_topics, topic_of

__all__ = [
    "WEB_ORGANIZER",
    "Classifier",
    "DocumentFilter",
    "FileDocuments",
    "FilterConfig",
    "GenerationConfig",
    "LabelConfig",
    "Labeller",
    "Labels",
    "LinearClassifier",
    "SampleConfig",
    "ShardDocuments",
    "compose",
    "filter_domains",
    "generate_documents",
    "generate_texts",
    "label_domains",
    "load_classifier",
    "start_state_of_documents",
    "start_state_of_model",
    "stated_topics",
    "topic_of",
]
