"Studies: what they are made of, that processes change nothing, and names that older results have"
import json, shutil
import pytest
from repq.recipes import get_recipe
from repq.networks.schemas import read_csv
from repq.plots import clear, labelled, paired, paper_figures, read_figures, results_table, summarize, upgrade
from repq.runs import read_rows
from repq.studies import Job, Study, best_rate, finished, keep, rate_beyond, study_results

def job(name, seed=0, **kw): return Job(name, get_recipe('repvgg_a0_tiny', 'plain', data='digits', epochs=1, batch_size=240, seed=seed, **kw))

def noted(): print('begun')

def test_processes_change_nothing(tmp_path):
    jobs = [job('a'), job('b', 1)]
    with Study(tmp_path/'here') as one, Study(tmp_path/'there', 2, noted) as two:
        rows = [s.run(jobs) for s in (one, two)]
    here, there = ([r['accuracy'] for r in own] for own in rows)
    assert here == there
    assert [r['seed'] for r in rows[1]] == [0, 1]
    quantized = Job('w4', get_recipe('repvgg_a0_tiny', 'plain', 4, data='digits', epochs=1, batch_size=240), 'a')
    assert Study(tmp_path/'here').run([quantized])[0]['stage'] == 'quantized'

def test_runs_may_start_from_each_other(tmp_path, capsys):
    "In any order, and those that are there already are not trained again, nor given a process"
    fp, w4 = job('fp'), Job('w4', get_recipe('repvgg_a0_tiny', 'plain', 4, data='digits', epochs=1, batch_size=240), 'fp')
    done = []
    rows = Study(tmp_path, 2).run([w4, fp, job('fp')], lambda: done.append(1))
    assert [r['stage'] for r in rows] == ['quantized', 'full-precision', 'full-precision'] and len(done) == 2
    again = Study(tmp_path, 10**6).run([w4, fp], lambda: done.append(1))
    assert again == rows[:2] and len(done) == 2
    assert capsys.readouterr().out.count('w4 ') == 2

class Scored(Study):
    "Scores in the place of training"
    def __init__(self, scores): self.scores, self.asked = scores, []
    def run(self, jobs):
        jobs = list(jobs)
        self.asked += jobs
        return [self.scores[j] and dict(accuracy=self.scores[j]) for j in jobs]

def test_a_run_that_is_about_to_end_is_not_finished_yet(tmp_path):
    "Another process has written its results, and not yet moved them from NAME.part to NAME"
    with Study(tmp_path) as study: study.run([job('lr0.1')])
    shutil.copytree(tmp_path/'lr0.1', tmp_path/'lr0.2.part')
    assert [*finished(tmp_path)] == ['lr0.1']

@pytest.mark.parametrize('scores,beyond,best,asked', [
    ({1: .5, 2: .5, 4: .4}, None, 1, 3), ({1: .5, 2: .6, 4: .4}, 2., 2, 3), ({1: .5, 2: .6, 4: .7, 8: .8}, 2., 8, 4),
    ({1: .5, 2: .4, 4: .3, .5: .2}, 2., 1, 4), ({1: None, 2: .1, 4: None}, None, 2, 3)])
def test_tuning(scores, beyond, best, asked):
    s = Scored({('k', lr): v for lr, v in scores.items()})
    assert s.tune({'k': (1, 2, 4)}, lambda k, lr: (k, lr), beyond) == {'k': best} and len(s.asked) == asked

def test_results_are_kept_over_earlier_ones_only(tmp_path):
    Study(tmp_path/'runs').run([job('tune-a'), job('a')])
    found = study_results(tmp_path/'runs', 'a command', images=5)
    for _ in range(2): keep(tmp_path/'kept.json', found)
    kept = json.loads((tmp_path/'kept.json').read_text())
    assert list(kept['rows']) == ['a'] and list(kept['tuning']) == ['tune-a'] and kept['images'] == 5
    assert kept['rows']['a']['accuracy'] == read_rows(tmp_path/'runs'/'a'/'results.json')[0]['accuracy']
    (tmp_path/'other.json').write_text('{}')
    with pytest.raises(FileExistsError, match='not made by repq'): keep(tmp_path/'other.json', found)

# Names

def row(method='merged', stage='quantized', bits=8, seed=0, **kw):
    return dict(method=method, stage=stage, weight_bits=bits, input_bits=bits, seed=seed, accuracy=.5, merged_accuracy=.5, size_bytes=1,
                bit_operations=1, step_ratio=None) | kw

def test_rows_of_0_1_0_and_of_now_are_one_series():
    old = row('repq-bn+norm+noise', epochs=3)
    new = row('repq-bn', epochs=3, seed=1, settings=dict(norm_after=True, input_noise=True))
    one, = summarize([old, new])
    assert (one['label'], one['method'], one['n']) == ('repq-bn+norm+noise', 'repq-bn', 2)
    assert old == row('repq-bn+norm+noise', epochs=3) # as it was

def test_without_training_is_not_the_trained_baseline():
    trained, untrained = row(epochs=3), row(epochs=0)
    assert [r['series'] for r in labelled([trained, untrained])] == ['merged, post-training', 'merged']
    assert [l.split('|')[2].strip() for l in results_table([trained, untrained]).split('\n')[2:]] == ['post-training', 'quantized']
    assert len({r['series'] for r in labelled([trained, upgrade(untrained)])}) == 2

def test_figures_stand_beside_what_they_are_of(tmp_path):
    (tmp_path/'paper.csv').write_text('method,weight_bits,accuracy\nmerged,8,70\nmerged+norm,8,80\n')
    figures = read_figures(tmp_path/'paper.csv')
    shown = [results_table([r], figures).split('|')[-2].strip() for r in (row(), row(settings=dict(norm_after=True)), row('merged+norm'), row(stage='post-training'))]
    assert shown == ['70.00', '80.00', '80.00', '–']

def test_the_papers_figures_are_those_of_its_tables(shared):
    quoted = {(r['model'], r['method'], r['weight_bits']): r for r in paper_figures()[1]}
    names = dict(B100='BSD100', U100='Urban100') # as the paper has them, and as benchmarks are called
    top1, dB = (read_csv(shared/'reference'/f'table{n}.csv') for n in (2, 3))
    for r in top1:
        model, method = r['model'], r['method']
        if method == 'qarepvgg': model, method = f'qa{model}', 'repq-bn' if r['weight_bits'] == '32' else 'merged'
        assert quoted[model, method, int(r['weight_bits'])]['accuracy'] == float(r['accuracy'])
    for r in dB:
        assert quoted[r['model'], r['method'], int(r['weight_bits'])][names.get(r['benchmark'], r['benchmark'])] == float(r['psnr'])
    assert len(quoted) == len(top1) + len(dB)//4

def test_a_plain_twin_stands_beside_its_network(tmp_path):
    (tmp_path/'theirs.csv').write_text('model,method,weight_bits,accuracy\nrepvgg_a0,plain,8,70\nrepvgg_a0,merged,8,80\n')
    figures = read_figures(tmp_path/'theirs.csv')
    shown = [results_table([row(m, model=n)], figures).split('|')[-2].strip() for m, n in
             (('plain', 'repvgg_a0_plain'), ('merged', 'repvgg_a0'), ('merged', 'repvgg_a0_plain'), ('plain', 'repvgg_b0_plain'))]
    assert shown == ['70.00', '80.00', '–', '–']

def test_differences():
    assert paired({0: 3, 1: 5, 2: 4}, {1: 4, 0: 1}) == [2, 1]
    assert clear([1, 1.1, .9]) and not clear([1, -1, 1]) and not clear([1, 1])
    assert best_rate({1: .1, 2: .1}) == 1 and rate_beyond([1, 2, 4], 2, 3) is None
