"Errors: an unknown name is a one-line message with the similar names."

import pytest

from mimstudy.core.errors import StudyError, check_name

METHODS = ['beit', 'conmim', 'maskfeat']


def test_a_name_that_exists_is_returned():
    assert check_name('beit', METHODS, 'method') == 'beit'
    assert check_name('beit', (name for name in METHODS), 'method') == 'beit'


@pytest.mark.parametrize(
    'name,hint',
    [
        ('conmin', 'did you mean conmim?'),
        ('resnet50', 'there are: beit, conmim, maskfeat'),
        ('', 'there are: beit, conmim, maskfeat'),
    ],
)
def test_an_unknown_name_is_one_line_with_a_hint(name, hint):
    with pytest.raises(StudyError) as error:
        check_name(name, METHODS, 'method')
    message = str(error.value)
    assert message.startswith(f'unknown method "{name}"') and hint in message
    assert '\n' not in message


def test_a_notebook_shows_the_message_without_a_traceback():
    assert StudyError('the message')._render_traceback_() == ['StudyError: the message']
