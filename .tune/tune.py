import sys, json, time, dataclasses, itertools, os
sys.path.insert(0, os.getcwd())
import torch
torch.set_num_threads(2)
from odit import config, data, plan, train, random, evaluate, metrics, sample
from odit.data import loader
from odit.config import Sampling, Guidance
from odit.models import dit
def job(a):
    w,d,h,steps,lr,times,dec,ts = a
    base=config.presets()['digits'][1]
    run=dataclasses.replace(base,steps=steps,model=dit.Config(width=w,depth=d,heads=h,patch=2),
        diffusion=dataclasses.replace(base.diffusion,times=times,time_scale=ts),
        optimizer=dataclasses.replace(base.optimizer,lr=lr,warmup=50,ema_decay=dec,beta2=0.99), device='cuda')
    ds=data.open_dataset(run.data); p=plan.make(run,ds); k=random.key(0)
    st=train.init_state(p,k); step=train.make_step(p)
    t=time.time(); tail=[]
    for b in loader.batches(ds,random.fold_in(k,'data'),global_batch=run.global_batch,start=0,stop=steps):
        st,m=step(st,b,k); tail.append(m['loss'])
    t=time.time()-t
    for solver,n,g in [('heun',10,1.0),('heun',10,2.0),('heun',10,3.0),('euler',20,2.0),('heun',20,2.0)]:
        r=evaluate.evaluate(p,st.ema,ds,sampling=Sampling(solver=solver,steps=n,guidance=Guidance(scale=g)))
        print(json.dumps(dict(cfg=a,loss=round(sum(tail[-50:])/50,4),train_s=round(t,1),solver=solver,n=n,g=g,acc=round(r['class_accuracy'],1),fd=round(r['frechet'],3),floor=round(r['frechet_floor'],3),near=round(r['nearest'],2),held=round(r['nearest_held_out'],2),copies=r['copies'],judge=round(r['judge_accuracy'],2))),flush=True)
if __name__=='__main__':
    import multiprocessing as mp
    jobs=[(128,6,4,550,1e-3,None,0.99,1000.0),(128,6,4,550,2e-3,None,0.99,1000.0),(128,4,4,830,2e-3,None,0.99,1000.0),(96,6,4,1000,1e-3,None,0.995,1000.0),
          (96,6,4,1000,2e-3,None,0.995,1000.0),(96,6,4,1000,2e-3,'logit-normal',0.995,1000.0),(96,4,4,1500,2e-3,None,0.995,1000.0),(64,6,4,2200,3e-3,None,0.995,1000.0),(96,6,4,1000,2e-3,None,0.995,1.0),(96,6,4,1000,4e-3,None,0.995,1000.0),(192,4,4,380,1e-3,None,0.98,1000.0),(96,6,4,2000,2e-3,None,0.998,1000.0)]
    with mp.get_context('spawn').Pool(6) as pool:
        for _ in pool.imap_unordered(job,jobs): pass
