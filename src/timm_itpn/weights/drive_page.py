"""The web pages with which Google Drive answers in place of a file: a warning with a button, or an error."""
import html.parser
import textwrap
import urllib.parse

__all__ = ['Page']

TRUSTED_HOSTS = ('.google.com', '.googleusercontent.com')
ERROR_CLASS = 'uc-error'  # how the class of Drive's error texts begins


class Page(html.parser.HTMLParser):
    """What a page says, and where it leads.

    Attributes:
        said: Its title and error texts, shortened to one line; '' if it has none.
        next_url: Where the button leads that downloads a file which Drive could not scan for viruses; '' if there is
            no such button, or if it leads away from Google.
    """

    def __init__(self, content: bytes, url: str, endpoint: str) -> None:
        """Read a page.

        Args:
            content: HTML in UTF-8.
            url: Address of the page.
            endpoint: Address whose host is trusted with its scheme, besides Google's hosts with https.
        """
        super().__init__()
        self._reading = ''  # the tag whose text is wanted
        self._texts: list[str] = []
        self._action: str | None = None
        self._in_form = False
        self._inputs: list[tuple[str, str]] = []
        self.feed(content.decode(errors='replace'))
        self.close()
        self.said = textwrap.shorten(' '.join(self._texts), width=160, placeholder=' ...')
        self.next_url = '' if self._action is None else _form_url(url, endpoint, self._action, self._inputs)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or '' for key, value in attrs}
        if tag == 'title' or found.get('class', '').startswith(ERROR_CLASS):
            self._reading = tag
        if tag == 'form':
            self._in_form = found.get('id') == 'download-form' and found.get('method', 'get').lower() == 'get'
            if self._in_form:
                self._action = found.get('action', '')
        elif tag == 'input' and self._in_form and 'name' in found:
            self._inputs.append((found['name'], found.get('value', '')))

    def handle_endtag(self, tag: str) -> None:
        if tag == self._reading:
            self._reading = ''
        if tag == 'form':
            self._in_form = False

    def handle_data(self, data: str) -> None:
        if self._reading:
            self._texts.append(data)


def _form_url(page_url: str, endpoint: str, action: str, inputs: list[tuple[str, str]]) -> str:
    """Address that a form's button asks for; '' if it is not Google's."""
    trusted = urllib.parse.urlsplit(endpoint)
    try:
        url = urllib.parse.urlsplit(urllib.parse.urljoin(page_url, action))
        host = url.hostname or ''
    except ValueError:  # an address that is none
        return ''
    is_google = url.scheme == 'https' and host.endswith(TRUSTED_HOSTS)
    if not is_google and (url.scheme, host) != (trusted.scheme, trusted.hostname):
        return ''
    return url._replace(query=urllib.parse.urlencode(inputs), fragment='').geturl()
